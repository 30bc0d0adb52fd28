"Training that cannot be lost: killed, asked to stop, damaged and mistaken for another, it ends with the same bytes."

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import WORDS

from so8t.flow import disk
from so8t.flow.problem import Problem
from so8t.train import units
from so8t.train.checkpoint import Checkpointer, latest, rng_state, set_rng_state

torch.set_num_threads(1)
STEPS = {"sft": 24, "ppo": 16, "dpo": 12}
KILLS = {"sft": 3, "ppo": 3, "dpo": 1}  # dpo takes long to start
CHILD = f"""
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from so8t.flow.config import Dpo, Lora, Ppo, Sft
from so8t.model import adapter
from so8t.train import dpo, ppo, sft, units
from so8t.train.checkpoint import Checkpointer
kind, base, folder = sys.argv[1], *map(Path, sys.argv[2:])
words = {WORDS!r}
quad = dict(task="T.", safety="S.", policy="P.", final="F.", answer="A word or two, then.")
rows = [{{"lang": "en", "prompt": f"Tell me {{i}} ways to {{text}}", "verdict": v, **quad}}
        for i in range(8) for v, text in words.items()]
settings = Sft(steps={STEPS["sft"]}, batch=4, micro_batch=2, learning_rate=1e-2, max_tokens=192,
               lora=Lora(rank=4, dropout=0.1))
work = sft.Training(base, rows, settings, "cpu", 0, quantization="nf4")
if kind != "sft":
    adapter.save(work.model, base / ("start-" + kind))
if kind == "ppo":
    settings = Ppo(iterations=4, rollouts=4, chunk=2, minibatch=2, micro_batch=1, epochs=1, max_new_tokens=24,
                   learning_rate=1e-3)
    work = ppo.Ppo(ppo.Policy(base, base / "start-ppo", settings, "cpu", quantization="nf4"), rows, 0)
if kind == "dpo":
    settings = Dpo(steps={STEPS["dpo"]}, batch=4, micro_batch=2, max_tokens=192)
    pairs = dpo.pairs_of(rows)
    work = dpo.Dpo(dpo.trainer_of(base, base / "start-dpo", pairs, settings, "cpu", quantization="nf4"), settings, 0)
saver = Checkpointer(folder / "checkpoints", {{"base": "tiny"}}, every=0.1, keep=3, stall=0.9)
units.run(work, saver, folder / "metrics.jsonl", lambda done, total, note: print(done, flush=True))
adapter.save(work.model, folder / "adapter")
"""


def start(kind: str, base: Path, folder: Path) -> subprocess.Popen:
    "A training process; it prints the number of each step that is done."
    return subprocess.Popen([sys.executable, "-c", CHILD, kind, str(base), str(folder)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, encoding="utf-8")


def stop_at(child: subprocess.Popen, step: int, how: int, pause: float = 0.0) -> int:
    "Send a signal a moment after a step; the last step that the process told of."
    said = 0
    for line in child.stdout:
        if (said := int(line)) >= step:
            break
    time.sleep(pause)
    child.send_signal(how)
    rest = child.communicate(timeout=300)[0].split()
    return int(rest[-1]) if rest else said


def result(kind: str, folder: Path) -> dict[str, str]:
    "Digests of all that a training ends with."
    final = folder / "checkpoints" / f"{STEPS[kind]:08d}-final"
    files = {**disk.files_below(folder / "adapter"), **disk.files_below(final), "metrics": folder / "metrics.jsonl"}
    return {name: hashlib.sha256(p.read_bytes()).hexdigest() for name, p in files.items() if name != disk.MANIFEST}


@pytest.fixture(scope="module", params=STEPS)
def whole(request, base, tmp_path_factory) -> tuple[str, dict[str, str]]:
    "A kind of training, and what it ends with where nobody disturbs it."
    folder, kind = tmp_path_factory.mktemp("whole"), request.param
    errors = start(kind, base, folder).communicate(timeout=300)[1]
    assert (folder / "adapter").is_dir(), errors
    rows = disk.read_jsonl(folder / "metrics.jsonl")
    assert len(rows) == STEPS[kind]
    if kind == "sft":
        losses = [row["loss"] for row in rows]
        assert sum(losses[-4:]) < sum(losses[:4])
    return kind, result(kind, folder)


def survive(base: Path, folder: Path, whole: tuple, kills: int, seed: int):
    "Kill a training at random moments, and let it come to its end."
    kind, expected = whole
    dice = random.Random(seed)
    for _ in range(kills):
        stop_at(start(kind, base, folder), dice.randrange(1, STEPS[kind]), signal.SIGKILL, dice.random() * 0.05)
    errors = start(kind, base, folder).communicate(timeout=300)[1]
    assert (folder / "adapter").is_dir(), errors
    assert result(kind, folder) == expected


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_killed_at_random_moments_it_ends_with_the_same_bytes(base, whole, tmp_path):
    survive(base, tmp_path, whole, kills=KILLS[whole[0]], seed=1)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(5))
def test_killed_ten_times_it_ends_with_the_same_bytes(base, whole, tmp_path, seed):
    survive(base, tmp_path, whole, kills=10, seed=seed)


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send these to another process")
def test_asked_to_stop_it_loses_no_step(base, whole, tmp_path):
    kind = whole[0]
    for step, how in ((4, signal.SIGTERM), (9, signal.SIGINT)):
        child = start(kind, base, tmp_path)
        last = stop_at(child, step, how)
        assert f"{last:08d}-emergency" in names(tmp_path) and child.returncode != 0
        assert [row["step"] for row in disk.read_jsonl(tmp_path / "metrics.jsonl")] == list(range(1, last + 1))
    survive(base, tmp_path, whole, kills=0, seed=0)


class Counting:
    "The smallest Trainable: it adds up what it draws."

    def __init__(self, total: int, seed: int = 0):
        self.done, self.total, self.changing, self.sum = 0, total, False, torch.zeros(3)
        torch.manual_seed(seed)

    def unit(self) -> dict:
        self.sum += torch.rand(3)
        self.done += 1
        return {"step": self.done, "sum": self.sum.sum().item()}

    def state(self) -> dict:
        return {"done": self.done, "sum": self.sum, "rng": rng_state()}

    def load(self, state: dict):
        self.done, self.sum = state["done"], state["sum"].clone()
        set_rng_state(state["rng"])

    def shrink(self) -> bool:
        return False


def saver(folder: Path, identity: str = "mine", **how) -> Checkpointer:
    return Checkpointer(folder / "checkpoints", {"base": identity}, **{"every": 0, "keep": 5, **how})


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").glob("[0-9]*"))


def count(folder: Path, total: int, **how) -> Counting:
    work = Counting(total)
    units.run(work, saver(folder, **how), folder / "metrics.jsonl")
    return work


def largest(folder: Path) -> Path:
    return max(folder.iterdir(), key=lambda p: (p.suffix == ".safetensors", p.stat().st_size))


def truncate(folder: Path):
    file = largest(folder)
    file.write_bytes(file.read_bytes()[:-10])


def zero(folder: Path):
    file = largest(folder)
    file.write_bytes(bytes(file.stat().st_size))


DAMAGE = {
    "truncated": truncate,
    "zeroed": zero,
    "missing": lambda folder: largest(folder).unlink(),
    "no manifest": lambda folder: (folder / disk.MANIFEST).unlink(),
    "empty": lambda folder: [p.unlink() for p in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_newest_checkpoint_is_skipped_and_the_end_is_the_same(tmp_path, damage):
    mine, other = tmp_path / "mine", tmp_path / "other"
    count(mine, 6)
    damage(mine / "checkpoints" / "00000006-final")
    said = []
    assert latest(saver(mine), said.append)["work"]["done"] == 5
    assert len(said) == 1 and "00000006-final" in said[0]
    assert torch.equal(count(mine, 9).sum, count(other, 9).sum)
    assert (mine / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()


def test_the_checkpoint_of_another_training_is_refused_by_name(tmp_path):
    count(tmp_path, 3, identity="phi")
    with pytest.raises(Problem, match="00000003-.*base is phi, not smol"):
        count(tmp_path, 5, identity="smol")


def test_the_newest_five_stay_and_the_one_resumed_from(tmp_path):
    count(tmp_path, 9)
    assert names(tmp_path) == [*(f"{n:08d}-rolling" for n in (5, 6, 7, 8)), "00000009-final"]
    count(tmp_path, 30)
    assert names(tmp_path) == ["00000009-final", *(f"{n:08d}-rolling" for n in (26, 27, 28, 29)), "00000030-final"]


def test_two_good_ones_stay_however_many_are_damaged(tmp_path):
    work, keeper = Counting(9), saver(tmp_path, keep=1)
    for step in range(1, 7):
        place = keeper.save(step, {"work": work.state()})
        keeper.wait()
        if step in (4, 5):
            truncate(place)
    good = [n for n in names(tmp_path) if not disk.verify(tmp_path / "checkpoints" / n)]
    assert good == ["00000003-rolling", "00000006-rolling"]


def test_rows_written_before_a_crash_are_not_written_twice(tmp_path, monkeypatch):
    work, keeper = Counting(6), saver(tmp_path)
    real = keeper.save

    def fails(step, *rest):
        if step == 4:
            raise MemoryError
        return real(step, *rest)

    monkeypatch.setattr(keeper, "save", fails)
    with pytest.raises(MemoryError):
        units.run(work, keeper, tmp_path / "metrics.jsonl")
    count(tmp_path, 6)
    assert [row["step"] for row in disk.read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


class Failing(Counting):
    "Runs into an error at its fourth unit, when it has drawn already; `halfway`: when it has changed something."

    def __init__(self, total: int, halfway: bool):
        super().__init__(total)
        self.halfway = halfway

    def unit(self) -> dict:
        if self.done == 3:
            torch.rand(3)
            self.changing = self.halfway
            raise MemoryError
        return super().unit()


@pytest.mark.parametrize("halfway", [False, True])
def test_after_an_error_the_last_boundary_is_saved_if_it_is_still_there(tmp_path, halfway):
    mine, other = tmp_path / "mine", tmp_path / "other"
    with pytest.raises(MemoryError):
        units.run(Failing(6, halfway), saver(mine, every=60), mine / "metrics.jsonl")
    assert names(mine) == ([] if halfway else ["00000003-emergency"])
    assert torch.equal(count(mine, 6).sum, count(other, 6).sum)
    assert (mine / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()


def test_an_error_is_told_even_where_nothing_can_be_saved(tmp_path, monkeypatch):
    keeper = saver(tmp_path, every=60)

    def fails(*_):
        raise OSError("no disk")

    monkeypatch.setattr(keeper, "save", fails)
    with pytest.raises(MemoryError) as caught:
        units.run(Failing(6, False), keeper, tmp_path / "metrics.jsonl")
    assert caught.value.__notes__ == ["no emergency checkpoint could be written: no disk"]


def test_finished_training_does_nothing_when_asked_again(tmp_path):
    first = count(tmp_path, 4)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert torch.equal(count(tmp_path, 4).sum, first.sum)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
