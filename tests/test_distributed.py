"Two ranks, killed and resumed to the bit."

import hashlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import WORDS

from so8t.data.row import check_row, read_rows, write_parquet
from so8t.flow import config as configs
from so8t.flow import disk
from so8t.train import sft

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs fork")
SETTINGS = "[so8t]\nruns = runs\nconfigs = .\nstages = .\nconfig = two.yaml\norder = base\n"
CONFIG = """name: two
training:
  sft: {steps: 12, batch: 8, micro_batch: 2, learning_rate: 1e-2, max_tokens: 64, lora: {rank: 4, dropout: 0.1}}
  checkpoint: {every_seconds: 0, keep: 3, stall: 0.9}
resources: {device: cpu, threads: 1}
"""


class Ranks:
    "A workspace, and ranks that train in it."

    def __init__(self, home: Path, base: Path):
        self.home, self.errors = home, (home / "errors.txt").open("w+")
        with disk.publish(home / "base") as folder:
            for file in base.iterdir():
                (folder / file.name).write_bytes(file.read_bytes())
        with disk.publish(home / "cleanse") as folder:
            rows = [{"lang": "en", "area": "test", "prompt": f"Tell me {i} ways to {text}", "verdict": verdict}
                    for i in range(6) for verdict, text in WORDS.items()]  # fmt: skip
            write_parquet(folder / "train.parquet", [check_row(row, "here") for row in rows])
        (home / "settings.ini").write_text(SETTINGS)
        (home / "two.yaml").write_text(CONFIG)
        env = os.environ | {"SO8T_WORKSPACE": str(home), "OMP_NUM_THREADS": "1"}
        program = [sys.executable, Path(__file__).with_name("ranks.py")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.parent = subprocess.Popen(program, text=True, env=env, **pipes)

    def train(self, out: str, kill_at: int = 0, victims=(0, 1), world: int = 2) -> list[int]:
        "Train; at a step, kill some ranks. The exit codes."
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        places = [self.home / "base", self.home / "cleanse", self.home / "two.yaml", self.home / out]
        print(port, world, *places, file=self.parent.stdin, flush=True)
        pids = []
        for line in self.parent.stdout:
            words = line.split()
            if words[0] == "pid":
                pids.append(int(words[1]))
            if words[0] == "ended":
                return [int(code) for code in words[1:]]
            if words[1:2] == ["of"] and int(words[0]) == kill_at:
                for victim in victims:
                    os.kill(pids[victim], signal.SIGKILL)
        raise AssertionError("the parent is gone")

    def result(self, out: str) -> dict[str, str]:
        "Digests of all that a training ends with."
        folder = self.home / out
        files = disk.files_below(folder / "adapter") | disk.files_below(folder / "checkpoints" / "00000012-final")
        files |= {"metrics": folder / "metrics.jsonl"}
        return {name: hashlib.sha256(p.read_bytes()).hexdigest() for name, p in files.items() if name != disk.MANIFEST}

    def said(self) -> str:
        self.errors.flush()
        return (self.home / "errors.txt").read_text()


@pytest.fixture(scope="module")
def ranks(base, tmp_path_factory):
    made = Ranks(tmp_path_factory.mktemp("ranks"), base)
    yield made
    made.parent.stdin.close()
    made.parent.wait(30)


def test_killed_ranks_end_with_the_same_bytes(ranks):
    assert ranks.train("whole") == [0, 0], ranks.said()
    assert ranks.train("killed", kill_at=5) == [-9, -9]
    assert 1 not in ranks.train("killed", kill_at=9, victims=(0, 1))
    assert ranks.train("killed") == [0, 0], ranks.said()
    assert disk.read_jsonl(ranks.home / "killed" / "metrics.resumed.jsonl")
    assert ranks.result("killed") == ranks.result("whole")


def test_a_rank_that_is_lost_ends_the_job_and_nothing_else(ranks):
    if not (ranks.home / "whole").is_dir():
        assert ranks.train("whole") == [0, 0], ranks.said()
    assert sorted(ranks.train("lost", kill_at=4, victims=(1,))) == [-9, 1]
    assert ranks.train("lost") == [0, 0], ranks.said()
    assert ranks.result("lost") == ranks.result("whole")


def test_another_number_of_ranks_is_refused(ranks):
    ranks.train("fewer", kill_at=4)
    assert ranks.train("fewer", world=1) == [1]
    assert "ranks is 2, not 1" in ranks.said()


def test_a_divided_base_is_killed_and_resumed_to_the_same_bytes(ranks):
    "FSDP: the same as undivided ones, so one may go on where the other was killed."
    if not (ranks.home / "whole").is_dir():
        assert ranks.train("whole") == [0, 0], ranks.said()
    divided = CONFIG.replace("threads: 1", "threads: 1, shard: true")
    try:
        (ranks.home / "two.yaml").write_text(divided)
        assert ranks.train("divided", kill_at=5) == [-9, -9]
        assert ranks.train("divided", world=1) == [1] and "ranks is 2, not 1" in ranks.said()
        assert ranks.train("divided") == [0, 0], ranks.said()
        (ranks.home / "two.yaml").write_text(divided.replace("batch: 8, micro_batch: 2", "batch: 9, micro_batch: 3"))
        assert ranks.train("uneven") == [1, 1] and "a batch leaves 1 rows over among 2 ranks" in ranks.said()
    finally:
        (ranks.home / "two.yaml").write_text(CONFIG)
    assert disk.read_jsonl(ranks.home / "divided" / "metrics.resumed.jsonl")
    assert ranks.result("divided") == ranks.result("whole")


def test_two_ranks_learn_what_one_process_learns(ranks, monkeypatch):
    monkeypatch.setenv("SO8T_WORKSPACE", str(ranks.home))
    (ranks.home / "two.yaml").write_text(CONFIG.replace("dropout: 0.1", "dropout: 0.0"))
    assert ranks.train("even") == [0, 0], ranks.said()
    settings = configs.load(ranks.home / "two.yaml").config.training
    torch.set_num_threads(1)
    rows = read_rows(ranks.home / "cleanse" / "train.parquet")
    alone = sft.Training(ranks.home / "base", rows, settings.sft, "cpu", settings.seed)
    for row in disk.read_jsonl(ranks.home / "even" / "metrics.jsonl")[:4]:
        mine = alone.unit()
        assert (row["loss"], row["gradient_norm"]) == pytest.approx((mine["loss"], mine["gradient_norm"]), rel=1e-2)
