"""configs/tiny.yaml with its real stages under every kind of error, on a disk that fills, and found in disorder at its
next start: it ends with the artifacts of a run that nothing disturbed, or stops with the sentence that helps."""

import json
import os
import random
import subprocess
import time
import uuid
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import power
import pytest
from garden import wait_for
from test_kill_tiny import Workspace, kill
from test_recovery import FAULTS, HOPELESS

from so8t.flow import disk, recovery

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and devices of POSIX")
STAGES = ("base", "collect", "cleanse", "sft", "ppo", "integrate", "benchmark", "report")
TRAINING = {"sft", "ppo"}
ADJUSTS = {"gpu memory", "host memory", "not a number"}  # a training goes on with other settings, so with other bytes

HOOK = """from pathlib import Path
laid = sorted(Path(stage.scene.root, "faults").glob(f"{stage.name}-*.py"))
waiting = [file for file in laid if not file.with_suffix(".struck").exists()]
if waiting and waiting[0].stem.endswith("-PLACE"):
    later = [file for file in waiting[1:] if "-now-" not in file.stem]
    for file in [*reversed(later), waiting[0]]:
        exec(file.read_text())"""
ONCE = """from {module} import {room}
def strike(*given, go_on={room}.{function}):
    if {when}:
        {room}.{function} = go_on
        exec(FAULT, globals())
    return go_on(*given)
{room}.{function} = strike"""
PUBLISHING = ONCE.format(module="so8t.flow", room="disk", function="seal",
                         when="given[0].parent.parent.name == 'artifacts'")
SAVING = ONCE.format(module="so8t.train", room="checkpoint", function="save_file", when="True")
IN_A_UNIT = """from so8t.train import units
def strike(work, go_on=units.attempt):
    if work.done >= AFTER:
        units.attempt, unit = go_on, work.unit
        def broken():
            del work.unit
            exec(FAULT, globals())
            return unit()
        work.unit = broken
    return go_on(work)
units.attempt = strike"""
MOMENTS = {"now": "exec(FAULT)", "publishing": PUBLISHING, "saving": SAVING, "unit": IN_A_UNIT}
POISON = "[weights.data.fill_(float('nan')) for weights in work.model.parameters() if weights.requires_grad]"
FILL = """import os, time
with (stage.run_dir.parent / "ballast").open("ab") as ballast:
    for size in (1 << 24, 1 << 16, 1 << 12):
        try:
            while True:
                os.posix_fallocate(ballast.fileno(), os.fstat(ballast.fileno()).st_size, size)
        except OSError:
            pass
time.sleep(PATIENCE)"""


@dataclass
class Fault:
    "What goes wrong in a stage, and when."

    stage: str
    kind: str
    moment: str = "now"  # where a cell has ended; publishing; saving (a checkpoint); unit (inside one)
    place: int = 0  # behind which cell, from the one that opens the stage
    after: int = 0  # units that are done


class Tiny(Workspace):
    "configs/tiny.yaml, its stages with a place for faults behind each cell."

    def __init__(self, root: Path, settings: str = "automation: {backoff: 0.01}\n", **more):
        super().__init__(root, **more)
        config = root / "configs" / "tiny.yaml"
        config.write_text(config.read_text(encoding="utf-8") + "\n" + settings, encoding="utf-8")
        self.faults, self.places = {}, {}
        (root / "faults").mkdir()
        for file in (root / "nbs" / "stages").glob("*.ipynb"):
            self.hook(file)

    def hook(self, file: Path):
        notebook, cells, publishes = json.loads(file.read_text(encoding="utf-8")), [], []
        for cell in notebook["cells"]:
            cells.append(cell)
            code = "".join(cell["source"]) if cell["cell_type"] == "code" else ""
            if code and ("= open_stage(" in code or publishes):
                publishes.append("stage.publish(" in code)
                hook = {"cell_type": "code", "id": f"hook{len(publishes)}", "metadata": {}, "outputs": []}
                source = HOOK.replace("PLACE", str(len(publishes) - 1))
                cells.append(hook | {"source": source, "execution_count": None})
        self.places[file.stem] = publishes.index(True)
        file.write_text(json.dumps(notebook | {"cells": cells}), encoding="utf-8")

    def lay(self, faults: list[Fault], sources=FAULTS):
        "Put faults in the way, those of a stage in this order: at once, in units, while publishing."
        for fault in faults:
            name = f"{fault.stage}-{len(self.faults):03d}-{fault.moment}-{fault.place}"
            mark = self.root / "faults" / f"{name}.struck"
            source = f"Path({str(mark)!r}).touch()\n{sources[fault.kind]}"
            text = MOMENTS[fault.moment].replace("AFTER", str(fault.after)).replace("FAULT", repr(source))
            (self.root / "faults" / f"{name}.py").write_text(text, encoding="utf-8")
            self.faults[mark] = fault

    def struck(self) -> list[Path]:
        "The marks of the faults that have come about."
        return [mark for mark in self.faults if mark.exists()]

    def endure(self) -> int:
        "Give the same command until the run is finished; how often it stopped before."
        for stops in range(len(self.faults) + 1):
            if self.start().wait(1800) == 0:
                return stops
        raise AssertionError((self.root / "out.txt").read_text())

    def ends(self, stage: str) -> list[dict]:
        "The attempts at a stage that failed, as the run told them."
        return [e for e in self.events() if e["event"] == "stage_ended" and e["stage"] == stage]

    def kinds(self, stage: str) -> list[str]:
        return [end["kind"] for end in self.ends(stage)]


def dealt(tiny: Tiny, each: int, dice: random.Random, stages=STAGES) -> list[Fault]:
    "For each stage some kinds of errors in random order, the rarest first; the last one strikes while it publishes."
    faults, count = [], Counter()
    for stage in stages:
        kinds = [kind for kind in FAULTS if stage not in TRAINING or kind not in ADJUSTS]
        dice.shuffle(kinds)
        kinds = sorted(kinds, key=lambda kind: count[kind])[:each]
        count.update(kinds)
        dice.shuffle(kinds)
        mine = [Fault(stage, kind) for kind in kinds]
        mine[-1].moment = "publishing"
        if stage in TRAINING:
            units = sorted(dice.sample(range(1, 35 if stage == "sft" else 6), each - 2))
            for fault, after in zip(mine[1:-1], units, strict=True):
                fault.moment, fault.after = "unit", after
        else:
            mine[-2].place = dice.randrange(tiny.places[stage])
        faults += mine
    return faults


def told(tiny: Tiny, stops: int, reference: dict[str, str]) -> list[dict]:
    "For each fault: what it was, whether it was told as what it is, and whether the run came to the same end."
    same, person = tiny.digests() == reference and tiny.repeated() == [], {k.kind: k.person for k in recovery.kinds()}
    rows, before = [], {}
    for mark, fault in tiny.faults.items():
        number = sum(row["stage"] == fault.stage for row in rows)
        end = tiny.ends(fault.stage)[number]
        right = end["kind"] == fault.kind
        right = right and (fault.kind not in HOPELESS or end["error"].startswith(person[fault.kind]))
        rows.append({"kind": fault.kind, "stage": fault.stage, "moment": fault.moment,
                     "behind": before.get(fault.stage, ""), "struck": mark.exists(), "told": right, "survived": same})
        before[fault.stage] = fault.kind
    ends = {stage: tiny.kinds(stage) for stage in STAGES}
    assert stops == sum(fault.kind in HOPELESS for fault in tiny.faults.values()), (stops, ends)
    return rows


def hard_training(tiny: Tiny) -> list[dict]:
    "In SFT and PPO: memory runs short twice, then the weights become no numbers. A run of another seed, to its end."
    config = tiny.root / "configs" / "tiny.yaml"
    text = config.read_text(encoding="utf-8").replace("name: tiny", "name: hard")
    text = text.replace("training:", "training:\n  seed: 1")
    (tiny.root / "configs" / "hard.yaml").write_text(text, encoding="utf-8")
    tiny.config = "hard"
    sources = FAULTS | {"not a number": POISON}
    for stage, units in (("sft", (8, 15, 22)), ("ppo", (1, 3, 5))):
        kinds = ("gpu memory", "host memory", "not a number")
        tiny.lay([Fault(stage, kind, "unit", after=after) for kind, after in zip(kinds, units, strict=True)], sources)
    assert tiny.endure() == 0
    rows = []
    for mark, fault in tiny.faults.items():
        made = json.loads(next(tiny.run.glob(f"artifacts/{fault.stage}/*/manifest.json")).read_text(encoding="utf-8"))
        steps = disk.read_jsonl(tiny.run / "metrics" / f"{fault.stage}.jsonl")
        right = tiny.kinds(fault.stage) == ["not a number"] and made["adjusted"]["slower"] == 0.5
        rows.append({"kind": fault.kind, "stage": fault.stage, "moment": "unit", "struck": mark.exists(), "told": right,
                     "survived": len(steps) > fault.after and "NaN" not in json.dumps(steps)})
    return rows


# ---- a disk that fills ----


class Cramped(Tiny, power.Cuttable):
    "Its runs lie on a small disk of their own."

    def __init__(self, root: Path):
        settings = "automation: {backoff: 0.01, balance: {free_disk: 8 MB}}\nlogging: {sample_seconds: 2}\n"
        super().__init__(root, settings, size=1 << 30)
        config = root / "configs" / "tiny.yaml"
        config.write_text(config.read_text().replace("  device: cpu", "  device: cpu\n  free_disk: 16 MB"))

    def fill(self, stages=STAGES):
        "The disk fills in each stage as it begins (so that it is measured), as a training saves, and as it publishes."
        for stage in stages:
            for moment in ("now", *["saving"] * (stage in TRAINING), "publishing"):
                source = FILL.replace("PATIENCE", "8" if moment == "now" else "0")
                self.lay([Fault(stage, "disk full", moment)], {"disk full": source})

    def relieved(self) -> list[dict]:
        "Run to the end; whenever the run waits for room, take the ballast away. What was said, and of which fault."
        runner, out, ballast = self.start(), self.root / "out.txt", self.disk / "ballast"
        hits, seen, known = [], 0, set()
        while runner.poll() is None:
            time.sleep(0.2)
            said = out.read_text()
            if not (ballast.exists() and ballast.stat().st_size):
                seen = len(said)
            elif how := [each for each in ("paused", "waits for room", "disk full") if each in said[seen:]]:
                time.sleep(1)
                assert runner.poll() is None, "it waits"
                fresh = [mark for mark in self.struck() if mark not in known]
                known.update(fresh)
                hits += [{"stage": f.stage, "moment": f.moment, "said": how[0]} for f in map(self.faults.get, fresh)]
                seen = len(out.read_text())
                os.truncate(ballast, 0)
        assert runner.returncode == 0, out.read_text()
        return hits


# ---- found in disorder ----


def clock_set_back(run: Path):
    "All that the run wrote is two hours ahead of the clock."
    for file in [run, *run.rglob("*")]:
        os.utime(file, (file.stat().st_mtime + 7200,) * 2)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    later = [e | {"time": (datetime.fromisoformat(e["time"]) + timedelta(hours=2)).isoformat()} for e in events]
    (run / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in later), encoding="utf-8")


def boot_id_changed(run: Path):
    "The machine was started since."
    for file in [*run.glob("*.json*"), *run.rglob("verified.json")]:
        file.write_text(file.read_text(encoding="utf-8").replace(disk.boot_id(), str(uuid.uuid4())), encoding="utf-8")


def session_deleted(run: Path):
    (run / "session.json").unlink(missing_ok=True)


def session_torn(run: Path):
    view = run / "session.json"
    os.truncate(view, view.stat().st_size // 2)


def locks_left_over(run: Path):
    "Lock files of a living process that holds none."
    for name in ("runner", "stage"):
        (run / f"{name}.lock").touch()
        (run / f"{name}.json").write_text(json.dumps({"pid": 1, "boot": disk.boot_id(), "since": ""}), encoding="utf-8")
    (run.parent / "create.lock").touch()


DISORDER = (clock_set_back, boot_id_changed, session_deleted, session_torn, locks_left_over)


class Disorderly(Workspace):
    "After each kill something is not as it was; and the command is always given twice at the same instant."

    def __init__(self, root: Path):
        super().__init__(root)
        self.found = []

    def start(self) -> subprocess.Popen:
        both, out = [super().start(), super().start()], self.root / "out.txt"
        before = out.read_text().count("is being executed by process")
        while all(each.poll() is None for each in both):
            time.sleep(0.05)
        both.sort(key=lambda each: each.poll() is not None)
        fine = both[1].poll() == 0 and out.read_text().count("is being executed by process") > before
        self.found.append({"what": "two runners at the same instant", "survived": fine or both[0].wait() == 0})
        return both[0]

    def disturbed(self, stages=STAGES):
        "Kill the run in each of the stages, a little after it has begun; then let it finish."
        for stage in stages:
            runner = self.start()
            begun = {"event": "stage_started", "stage": stage}
            wait_for(lambda begun=begun: any(begun.items() <= e.items() for e in self.events()), patience=1800)
            time.sleep(random.uniform(1, 8))
            kill(self, runner, "group")
            runner.wait(120)
            self.mend()
        self.finish()

    def finish(self):
        assert self.start().wait(1800) == 0, (self.root / "out.txt").read_text()

    def mend(self):
        if self.run and (self.run / "session.json").exists():
            disorder = DISORDER[len(self.found) % len(DISORDER)]
            disorder(self.run)
            self.found.append({"what": disorder.__name__.replace("_", " ")})


# ---- the proofs ----


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> dict[str, str]:
    "The artifacts of a run that nothing disturbed."
    tiny = Tiny(tmp_path_factory.mktemp("reference"))
    tiny.finish()
    return tiny.digests()


def test_a_real_stage_that_fails_while_it_publishes(tmp_path):
    "By a full disk, or where none can be mounted, by the death of its kernel."
    room = power.possible()
    tiny, kind = (Cramped(tmp_path), "disk full") if room else (Tiny(tmp_path), "dead kernel")
    config = tmp_path / "configs" / "tiny.yaml"
    config.write_text(config.read_text() + "\nstages: [collect]\n", encoding="utf-8")
    try:
        tiny.lay([Fault("collect", kind, "publishing")], FAULTS | {"disk full": FILL.replace("PATIENCE", "0")})
        hits = tiny.relieved() if room else tiny.endure() or []
        assert tiny.struck() and tiny.kinds("collect") == [kind] and len(hits) == room
        assert set(tiny.digests()) == {"collect"}
    finally:
        tiny.leave()


@pytest.mark.soak
def test_errors_of_all_kinds_in_every_stage(reference, tmp_path):
    tiny = Tiny(tmp_path)
    tiny.lay(dealt(tiny, 7, random.Random()))
    rows = told(tiny, tiny.endure(), reference)
    print(f"{len(rows)} errors in one run")
    assert [row for row in rows if not (row["struck"] and row["told"] and row["survived"])] == []


@pytest.mark.soak
def test_trainings_short_of_memory_and_with_poisoned_weights(tmp_path):
    rows = hard_training(Tiny(tmp_path))
    assert [row for row in rows if not (row["struck"] and row["told"] and row["survived"])] == []


@pytest.mark.soak
@pytest.mark.skipif(not power.possible(), reason="only root may mount a disk")
def test_the_disk_fills_in_every_stage(reference, tmp_path):
    tiny = Cramped(tmp_path)
    try:
        tiny.fill()
        hits = tiny.relieved()
        assert len(tiny.struck()) == len(tiny.faults)
        assert tiny.digests() == reference and tiny.repeated() == []
        assert any(e["event"] == "paused" for e in tiny.events())
        assert {kind for stage in STAGES for kind in tiny.kinds(stage)} == {"disk full"}
        print(f"the disk was full {len(hits)} times")
    finally:
        tiny.leave()


@pytest.mark.soak
def test_found_in_disorder(reference, tmp_path):
    "A kill in each stage; after each, one thing is in disorder, and two runners are started at once."
    workspace = Disorderly(tmp_path)
    workspace.disturbed()
    assert workspace.digests() == reference and workspace.repeated() == []
    assert [row for row in workspace.found if not row.get("survived", True)] == []
    assert len(list((workspace.root / "runs").glob("tiny-*"))) == 1
