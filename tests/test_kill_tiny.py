"configs/tiny.yaml, killed at random moments and started again by the same command, ends with the same artifacts."

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest

from so8t.flow import disk, guard

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")


class Workspace:
    "A workspace with the real stages and configurations, and runs of its own."

    def __init__(self, root: Path, config: str = "tiny"):
        self.root, self.config = root, config
        shutil.copytree(ROOT / "nbs" / "stages", root / "nbs" / "stages")
        shutil.copytree(ROOT / "configs", root / "configs")
        shutil.copy(ROOT / "settings.ini", root)

    def start(self) -> subprocess.Popen:
        "The one command."
        command = [sys.executable, "-c", "from so8t.cli import main; main()", "run", self.config]
        out = (self.root / "out.txt").open("ab")
        return subprocess.Popen(command, cwd=self.root, stdout=out, stderr=out, start_new_session=True)

    def mend(self):
        "Nothing has to be done after a kill."

    def leave(self):
        "Nor at the end."

    def finish(self):
        code = self.start().wait(600)
        assert code == 0, (self.root / "out.txt").read_text()

    @property
    def run(self) -> Path | None:
        return next(iter(sorted((self.root / "runs").glob(f"{self.config}-*"))), None)

    def digests(self) -> dict[str, str]:
        "Content digest of each stage's artifact."
        found = sorted(self.run.glob("artifacts/*/*/manifest.json"))
        assert len(found) == len({p.name.partition(".")[0] for p in (self.run / "notebooks").glob("*.ipynb")})
        return {f.parts[-3]: json.loads(f.read_text(encoding="utf-8"))["digest"] for f in found}

    def shipped(self) -> dict[str, bytes]:
        "What was uploaded, without the pages that name the run."
        files, about = disk.files_below(self.root / "shipped"), ("README.md", "metadata.json", disk.MANIFEST)
        return {name: file.read_bytes() for name, file in files.items() if file.name not in about}

    def events(self) -> list[dict]:
        "What happened so far, told line by line; a torn last line is no event."
        file = self.run and self.run / "events.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file and file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def repeated(self) -> list[str]:
        "Stages that were started again after they had finished."
        finished, again = set(), []
        for event in self.events():
            if event["event"] == "stage_started" and event["stage"] in finished:
                again.append(event["stage"])
            if event["event"] == "stage_finished":
                finished.add(event["stage"])
        return again


def lost(workspace: Workspace) -> dict:
    "The stage that is being executed, and the seconds since it began or made its newest checkpoint."
    events = workspace.events()
    begun = next((e for e in reversed(events) if e["event"].startswith(("stage_", "run_started"))), None)
    if not begun or begun["event"] != "stage_started":
        return {"stage": "between stages", "lost": 0.0}
    saved = [f.stat().st_mtime for f in workspace.run.glob(f"checkpoints/{begun['stage']}/*/manifest.json")]
    newest = max([datetime.fromisoformat(begun["time"]).timestamp(), *saved])
    return {"stage": begun["stage"], "lost": max(0.0, time.time() - newest)}


def kill(workspace: Workspace, runner: subprocess.Popen, how: str):
    "SIGKILL to the runner alone, to its kernel alone, or to the runner's whole process group; or the power is cut."
    if how == "power":
        workspace.cut()
    if how in ("group", "power"):
        os.killpg(runner.pid, signal.SIGKILL)
    elif how == "kernel":
        for process in guard.marked(workspace.run) if workspace.run else []:
            process.kill()
    else:
        runner.kill()


HOW = ("runner", "kernel", "group")


def killed(workspace: Workspace, kills: int, wait: Callable[[], float], how=HOW) -> list[dict]:
    "Start and kill until the run is finished or enough kills were made; what each kill hit."
    hits, dice = [], random.Random()
    while len(hits) < kills:
        runner, this = workspace.start(), dice.choice(how)
        try:
            runner.wait(wait())
            break
        except subprocess.TimeoutExpired:
            hits.append({"how": this, **lost(workspace)})
            kill(workspace, runner, this)
        if this == "kernel":
            time.sleep(1)
            runner.send_signal(signal.SIGTERM)
        runner.wait(120)
        workspace.mend()
    workspace.finish()
    return hits


def soon() -> float:
    "Seconds until the next kill."
    return random.uniform(1, 25)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> dict[str, str]:
    "The artifacts of a run that nothing interrupted."
    workspace = Workspace(tmp_path_factory.mktemp("reference"))
    workspace.finish()
    return workspace.digests()


def test_two_kills(reference, tmp_path):
    workspace = Workspace(tmp_path)
    assert len(killed(workspace, 2, soon)) == 2
    assert workspace.digests() == reference
    assert workspace.repeated() == []


@pytest.mark.soak
def test_twenty_kills(reference, tmp_path):
    hits = 0
    for number in range(20):
        workspace = Workspace(tmp_path / str(number))
        hits += len(killed(workspace, 20 - hits, soon))
        assert workspace.digests() == reference
        assert workspace.repeated() == []
        if hits >= 20:
            break
    print(f"{hits} kills in {number + 1} runs, all finished with the same artifacts")
    assert hits == 20


@pytest.mark.soak
def test_ten_kills_of_the_whole_mission(tmp_path):
    undisturbed, workspace = Workspace(tmp_path / "a", "complete"), Workspace(tmp_path / "b", "complete")
    undisturbed.finish()
    hits = len(killed(workspace, 10, soon))
    made, wanted = workspace.digests(), undisturbed.digests()
    assert {name for name in wanted if made[name] != wanted[name]} <= {"upload", "cleanup"}, "these two name the run"
    assert workspace.shipped() == undisturbed.shipped()
    assert workspace.repeated() == []
    print(f"{hits} kills of configs/complete.yaml, finished with the same artifacts")
    assert hits >= 5
