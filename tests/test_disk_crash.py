"""Kill the writer, cut the power, fill the disk: at every step of every way to write, not at random ones.

The invariant: a reader sees the old state or the new one, never a mixture; nothing that was there is lost; what was
acknowledged survives; and the same call, made again, ends in the new state. The last test counts what was tried.
"""

import errno
import json
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import crashes
import pytest
from crashes import SCENARIOS, Died, Disk, Failing, Looking, Recorder, Scenario, Watched, standing_in

from so8t.flow import disk
from so8t.flow.problem import Problem

KILLED = ("write over a file", "append a row", "append after a torn row", "publish", "publish over a damaged folder")


@contextmanager
def prepared(scenario: Scenario):
    "A folder in its old state, with that state and the new one as a reader sees them."
    with TemporaryDirectory(dir=crashes.MEMORY) as room, standing_in(Watched()):
        old, new = Path(room) / "old", Path(room) / "new"
        for folder in (old, new):
            folder.mkdir()
            scenario.prepare(folder)
        (scenario.right or scenario.act)(new)
        yield old, scenario.look(old), scenario.look(new)


def steps_of(scenario: Scenario) -> list[str]:
    "The labels of all its steps, in order."
    labels = []

    class Listing(Watched):
        def around(self, label, do, args):
            labels.append(label)
            return super().around(label, do, args)

    with prepared(scenario) as (folder, *_), standing_in(Listing()):
        scenario.act(folder)
    return labels


def check(scenario: Scenario, folder: Path, old, new, when: str, acknowledged: bool = False):
    "The reader sees what he may; after garbage collection nothing is left; the same call ends in the new state."
    allowed = [new] if acknowledged else [old, new, *scenario.between]
    seen = scenario.look(folder)
    assert seen in allowed, when
    with standing_in(Watched()):
        disk.collect_garbage(folder)
        left = [p.name for p in folder.rglob(".*") if p.name.startswith((disk.TEMPORARY, disk.STAGING))]
        assert (left, scenario.look(folder)) == ([], seen), f"{when}, garbage collected"
        scenario.act(folder)
        assert scenario.look(folder) == (seen + new[len(old) :] if scenario.adds else new), f"{when}, done again"


# ---- a process killed at every step ----


@cache
def kills(name: str) -> int:
    "Kill a process before each step and in the midst of each write."
    scenario, labels = SCENARIOS[name], steps_of(SCENARIOS[name])
    points = [(at, "before") for at in range(1, len(labels) + 1)]
    points += [(at, "half") for at, label in enumerate(labels, 1) if label in ("write", "remove")]
    for at, phase in points:
        with prepared(scenario) as (folder, old, new):
            command = [sys.executable, crashes.__file__, name, str(folder), str(at), phase]
            assert subprocess.run(command).returncode != 0
            check(scenario, folder, old, new, f"{name}: killed {phase} step {at}")
    return len(points)


@pytest.mark.parametrize("name", KILLED)
def test_killed_at_every_step(name):
    assert kills(name) > 3


# ---- a reader at every step ----


@cache
def looks(scenario: Scenario) -> int:
    with prepared(scenario) as (folder, old, new):
        with standing_in(Looking(lambda: scenario.look(folder))) as looking:
            scenario.act(folder)
        assert [seen for seen in looking.seen if seen not in (old, new, *scenario.between)] == []
        assert looking.seen[-1] == new
    return len(looking.seen)


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_reader_at_every_step_sees_old_or_new(name):
    assert looks(SCENARIOS[name]) > 3


# ---- the power cut at every step ----


def check_each(trees, scenario: Scenario, old, new, when: str, acknowledged: bool) -> int:
    "Check each different one of the trees that a disk may hold; how many there were."
    known = set()
    with TemporaryDirectory(dir=crashes.MEMORY) as room:
        for tree in trees:
            if crashes.fingerprint(tree) not in known:
                folder = Path(room) / str(len(known))
                known.add(crashes.fingerprint(tree))
                crashes.materialise(tree, folder)
                check(scenario, folder, old, new, when, acknowledged)
                shutil.rmtree(folder)
    return len(known)


@cache
def power_cuts(scenario: Scenario, skips: tuple = ()) -> int:
    "Cut the power before each step, and after the last, when all was acknowledged."
    tried = 0
    with prepared(scenario) as (folder, old, new):
        record = Disk(folder)
        with standing_in(Recorder(skips=skips)) as recorder:
            scenario.act(folder)
        for done in range(len(recorder.log) + 1):
            when = f"power cut after {[label for label, *_ in recorder.log[:done]]}"
            trees = record.after_power_cut(hidden=not skips)
            tried += check_each(trees, scenario, old, new, when, done == len(recorder.log))
            if done < len(recorder.log):
                record.replay(*recorder.log[done])
    return tried


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_power_is_cut_at_every_step(name):
    assert power_cuts(SCENARIOS[name]) > 15


@cache
def second_lives(scenario: Scenario) -> int:
    "The process dies at a step, the machine lives on, the same call is made again and acknowledged: power cut."
    tried = 0
    for at in range(1, len(steps_of(scenario)) + 1):
        with prepared(scenario) as (folder, old, new):
            record = Disk(folder)
            with standing_in(Recorder(dies_at=at)) as first, suppress(Died):
                scenario.act(folder)
            left = scenario.look(folder)
            with standing_in(Recorder(first.log)) as second:
                scenario.act(folder)
            for step in second.log:
                record.replay(*step)
            new = left + new[len(old) :] if scenario.adds else new
            trees = record.after_power_cut(hidden=False)
            tried += check_each(trees, scenario, left, new, f"died at step {at}, done again, power cut", True)
    return tried


# A folder that the first process made and did not come to sync is left to the file system's journal: to sync every
# parent at every write would cost more than it is worth.
@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "write into a new folder"])
def test_what_a_second_process_acknowledges_survives_too(name):
    assert second_lives(SCENARIOS[name]) > 3


# ---- a full disk, a bad disk ----


@cache
def faults(scenario: Scenario) -> int:
    "Each step fails, once or from then on, with no room or with an error of the disk."
    tried = 0
    for at in range(1, len(steps_of(scenario)) + 1):
        for code in (errno.ENOSPC, errno.EIO):
            for lasting in (False, True):
                tried += 1
                with prepared(scenario) as (folder, old, new):
                    when = f"{errno.errorcode[code]} at step {at}{' and ever after' if lasting else ''}"
                    with standing_in(Failing(at, code, lasting)) as failing:
                        fault = error_of(scenario, folder)
                    assert failing.count >= at, when
                    assert fault is None or str(folder) in fault, f"{when}: {fault} names no file"
                    check(scenario, folder, old, new, when, acknowledged=fault is None)
    return tried


def error_of(scenario: Scenario, folder: Path) -> str | None:
    "What the caller is told."
    try:
        scenario.act(folder)
    except (Problem, OSError) as error:
        return str(error)


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_full_or_bad_disk_at_every_step(name):
    assert faults(SCENARIOS[name]) > 15


# ---- careless writers are caught ----


def write_in_place(folder: Path):
    with disk.steps.open(folder / "state.json", "r+b") as file:
        disk.steps.truncate(file, 0)
        disk.steps.write(file, json.dumps(crashes.NEW).encode())
        disk.steps.sync(file)


def write_and_name_too_soon(folder: Path):
    with disk.steps.open(folder / ".tmp-state", "xb") as file:
        disk.steps.write(file, json.dumps(crashes.NEW).encode())
    disk.steps.replace(folder / ".tmp-state", folder / "state.json")
    disk.sync_folder(folder)


def append_without_healing(folder: Path):
    with disk.steps.open(folder / "log.jsonl", "a+b") as file:
        disk.steps.write(file, b'{"n": 4}\n')
        disk.steps.sync(file)


def blank_manifest() -> dict:
    return {"format": 1, "files": {}, "digest": "", "published": "", "seal": ""}


@contextmanager
def publish_without_staging(place: Path, **info):
    disk.steps.mkdir(place)
    yield place
    disk.seal(place, blank_manifest())
    disk.sync_folder(place.parent)


@contextmanager
def publish_with_the_manifest_first(place: Path, **info):
    with TemporaryDirectory(dir=crashes.MEMORY) as room, standing_in(Watched()):
        crashes.publish(Path(room))
        manifest = (Path(room) / "sft" / "abc" / disk.MANIFEST).read_bytes()
    disk.steps.mkdir(place)
    crashes.write_outside(place / disk.MANIFEST, manifest)
    yield place


@contextmanager
def publish_and_name_too_soon(place: Path, **info):
    staging = disk.beside(place, disk.STAGING)
    disk.steps.mkdir(staging)
    yield staging
    disk.steps.replace(staging, place)
    disk.sync_folder(place.parent)
    disk.seal(place, blank_manifest())


def careless(name: str, act) -> Scenario:
    return SCENARIOS[name]._replace(act=act, right=SCENARIOS[name].act)


def publishing(publish_as) -> Scenario:
    return careless("publish", lambda folder: crashes.publish(folder, publish_as))


@pytest.mark.parametrize("skips", ["sync", "sync_folder"])
@pytest.mark.parametrize("name", ["write over a file", "append the first row", "publish"])
def test_a_sync_left_out_is_caught(name, skips):
    with pytest.raises(AssertionError, match="power cut"):
        power_cuts(SCENARIOS[name], (skips,))


CARELESS = [
    careless("write over a file", write_in_place),
    careless("write over a file", write_and_name_too_soon),
    publishing(publish_without_staging),
    publishing(publish_with_the_manifest_first),
    publishing(publish_and_name_too_soon),
]


@pytest.mark.parametrize("scenario", CARELESS)
def test_a_careless_writer_is_caught_by_the_power_cut(scenario):
    with pytest.raises(AssertionError, match="power cut"):
        power_cuts(scenario)


@pytest.mark.parametrize("scenario", [CARELESS[0], CARELESS[2], CARELESS[3]])
def test_a_careless_writer_is_caught_by_a_reader_and_by_a_full_disk(scenario):
    with pytest.raises(AssertionError):
        looks(scenario)
    with pytest.raises(AssertionError, match="ENOSPC"):
        faults(scenario)


def test_a_row_that_joins_a_torn_one_is_caught():
    with pytest.raises(AssertionError):
        looks(careless("append after a torn row", append_without_healing))


def test_a_second_process_that_trusts_what_it_sees_is_caught(monkeypatch):
    "It finds the folder whole, and does not sync the name that the first one died over."

    def trusting(staging, folder):
        if not folder.exists():
            disk.replace(staging, folder)
            disk.sync_folder(folder.parent)

    monkeypatch.setattr(disk, "install", trusting)
    with pytest.raises(AssertionError, match="done again"):
        second_lives(careless("publish", crashes.publish))


# ---- how many ----


def test_how_many_were_tried():
    "Shown by `pytest -s`."
    tried = {
        "killed": Counter({name: kills(name) for name in KILLED}),
        "read": Counter({name: looks(s) for name, s in SCENARIOS.items()}),
        "power cut": Counter({name: power_cuts(s) for name, s in SCENARIOS.items()}),
        "second life": Counter({n: second_lives(s) for n, s in SCENARIOS.items() if n != "write into a new folder"}),
        "full or bad disk": Counter({name: faults(s) for name, s in SCENARIOS.items()}),
    }
    for name in SCENARIOS:
        print(f"\n{name:40}", *(f"{family}: {counts[name]:<6}" for family, counts in tried.items()), end="")
    totals = {family: counts.total() for family, counts in tried.items()}
    print("\n", totals, sum(totals.values()))
    said = {"killed": 60, "read": 116, "power cut": 2194, "second life": 89, "full or bad disk": 392}
    assert {family: count for family, count in said.items() if totals[family] < count} == {}, "flow.disk says more"
