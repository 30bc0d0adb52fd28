"The search comes to its end, and to the same trials, however often it is killed; its mistakes are one line."

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import WORDS

from so8t.flow import disk
from so8t.flow.config import Lora, Search, Sft, Span
from so8t.flow.problem import Problem
from so8t.train import search, sft
from so8t.train.checkpoint import Checkpointer

torch.set_num_threads(1)
TRIALS, STEPS = 3, 12
RATE = Span(key="learning_rate", low=1e-3, high=1e-1, log=True)
OVER = [RATE, Span(key="lora.rank", choices=[2, 4])]
CHILD = """
import sys
from pathlib import Path
from test_search import tuned
tuned(*map(Path, sys.argv[1:]), lambda done, total, note: print(done, flush=True))
"""


def objective(base: Path, folder: Path, over: list[Span] = OVER, progress=lambda *_: None) -> search.Objective:
    rows = [{"prompt": f"Tell me {i} ways to {text}", "verdict": v} for i in range(8) for v, text in WORDS.items()]
    wanted = Search(trials=TRIALS, steps=STEPS, rows=8, reports=2, over=over)
    settings = Sft(batch=4, micro_batch=2, max_tokens=96, lora=Lora(rank=4, dropout=0.1))
    learn, kept = search.hold_out(rows, wanted.rows, wanted.seed)

    def make(chosen: Sft) -> sft.Training:
        return sft.Training(base, learn, chosen, "cpu", 0)

    def saver(place: Path, values: dict) -> Checkpointer:
        return Checkpointer(place, {"values": str(values)}, every=0.05, say=lambda _: None)

    return search.Objective(wanted, settings, make, kept, folder, saver, progress)


def tuned(base: Path, folder: Path, progress=lambda *_: None) -> list[dict]:
    "The trials of a search in a folder."
    return search.table(search.run(objective(base, folder, progress=progress), {"data": "mine"}))


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory) -> list[dict]:
    "The trials of a search that nobody disturbs."
    return tuned(base, tmp_path_factory.mktemp("whole"))


def steps_of(folder: Path, trial: int) -> list[int]:
    "The training units that a trial has done, as its metrics tell."
    return [row["step"] for row in disk.read_jsonl(folder / f"trial-{trial:03d}" / "metrics.jsonl")]


def test_every_trial_ends_and_the_best_is_the_smallest(whole):
    assert [row["number"] for row in whole] == list(range(TRIALS))
    complete = {row["objective"]: row for row in whole if row["state"] == "complete"}
    found = search.best(whole)
    assert found == {"values": complete[min(complete)]["values"], "objective": min(complete),
                     "trial": complete[min(complete)]["number"]}
    assert set(found["values"]) == {"learning_rate", "lora.rank"} and len(complete) > 1
    assert all(row["reports"][-1] == [STEPS, row["objective"]] for row in complete.values())


def killed(base: Path, folder: Path, at: int):
    "A search killed when so many steps are done."
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(base), str(folder)], stdout=subprocess.PIPE, text=True,
                             cwd=Path(__file__).parent)
    for line in child.stdout:
        if int(line) >= at:
            break
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_killed_in_a_trial_it_goes_on_from_there_and_repeats_nothing(base, whole, tmp_path):
    killed(base, tmp_path, at=STEPS + 9)
    first = tmp_path / "trial-000" / "metrics.jsonl"
    before = first.stat().st_mtime_ns
    assert not (tmp_path / "trial-002").exists()
    told = []
    rows = tuned(base, tmp_path, lambda done, total, note: told.append(done))
    assert rows == whole
    assert first.stat().st_mtime_ns == before and min(told) > STEPS + STEPS // 2
    resumed = disk.read_jsonl(tmp_path / "trial-001" / "metrics.resumed.jsonl")
    assert resumed[-1]["step"] >= STEPS // 2
    assert [steps_of(tmp_path, trial)[-1] for trial in range(TRIALS)] == [row["reports"][-1][0] for row in rows]
    for trial in range(TRIALS):
        assert steps_of(tmp_path, trial) == list(range(1, len(steps_of(tmp_path, trial)) + 1))


def test_an_unknown_key_is_one_clear_line_before_any_trial(base, tmp_path):
    with pytest.raises(Problem) as caught:
        objective(base, tmp_path, [RATE, Span(key="lora.rnak", choices=[2, 4])])
    assert str(caught.value) == ("training.search.over[1].key: training.sft has no lora.rnak that could be searched; "
                                 "did you mean lora.rank?")
    with pytest.raises(Problem, match=r"^training.search.over\[0\].key: training.sft.lora.rank: must be"):
        objective(base, tmp_path, [Span(key="lora.rank", choices=[4, -1])])
    assert not list(tmp_path.iterdir())
