"A small workspace with real notebooks, for tests: `seed` publishes, `grow` reads it slowly, `pick` reads that."

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

LIBRARY = Path(__file__).parents[1] / "so8t"
SETTINGS = (
    "[so8t]\nruns = {runs}\nconfigs = configs\nstages = stages\nconfig = configs/garden.yaml\norder = seed grow pick\n"
)
CONFIG = """name: garden
stages: [seed, grow, pick]
automation: {retries: 1, backoff: 0.1, grace: 20, timeout: 0}
resources: {free_disk: 1 MB}
custom: {seed: {kind: oak}, grow: {rain: 3}}
"""
SEED = """with stage.publish() as folder:
    (folder / "result.txt").write_text(stage.config.custom.seed["kind"])"""
GROW = """import os, subprocess, sys, time
from pathlib import Path
from so8t.flow import disk
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
disk.write_json(stage.run_dir / "pids.json", {"kernel": os.getpid(), "child": child.pid})
while not Path(stage.scene.root, "rain").exists():
    time.sleep(0.05)
child.kill()
child.wait();"""
GROWN = """with stage.publish() as folder:
    (folder / "result.txt").write_text((stage.inputs["seed"] / "result.txt").read_text() + ", grown")"""
PICK = """from so8t.data import verdict
with stage.publish() as folder:
    (folder / "result.txt").write_text("a leaf of: " + (stage.inputs["grow"] / "result.txt").read_text())"""


def write_notebook(
    root: Path,
    name: str,
    reads: list[str],
    uses: list[str],
    *sources: str,
    note: str = "# A stage",
    tags=("parameters", "stage"),
):
    "A stage notebook."
    opened = f"from so8t.flow.stage import open_stage\nstage = open_stage({name!r}, config, run, reads, uses)\nstage"
    texts = ["config = 'configs/garden.yaml'\nrun = ''", f"reads = {reads!r}\nuses = {uses!r}", opened, *sources]
    cells = [{"cell_type": "markdown", "id": "note", "metadata": {}, "source": note}]
    for i, text in enumerate(texts):
        mine = [tags[i]] if i < len(tags) else []
        cells.append(
            {
                "cell_type": "code",
                "id": f"c{i}",
                "metadata": {"tags": mine},
                "source": text,
                "outputs": [],
                "execution_count": None,
            }
        )
    nb = {
        "cells": cells,
        "metadata": {"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    (root / "stages" / f"{name}.ipynb").write_text(json.dumps(nb), encoding="utf-8")


class Garden:
    "The workspace, with a copy of the library that tests may change."

    def __init__(self, root: Path, runs: str = "runs"):
        self.root, self.runs = root, root / runs
        for folder in ("stages", "configs", "lib"):
            (root / folder).mkdir(parents=True)
        shutil.copytree(LIBRARY, root / "lib" / "so8t", ignore=shutil.ignore_patterns("__pycache__"))
        (root / "settings.ini").write_text(SETTINGS.format(runs=runs), encoding="utf-8")
        self.config = root / "configs" / "garden.yaml"
        self.config.write_text(CONFIG, encoding="utf-8")
        write_notebook(root, "seed", [], ["custom.seed"], SEED)
        write_notebook(root, "grow", ["seed"], ["custom.grow"], GROW, GROWN)
        write_notebook(root, "pick", ["grow"], ["name"], PICK)
        self.rain()

    def rain(self):
        "Let `grow` come to its end."
        (self.root / "rain").touch()

    def drought(self):
        "Let `grow` wait."
        (self.root / "rain").unlink(missing_ok=True)

    @property
    def env(self) -> dict:
        return {**os.environ, "PYTHONPATH": str(self.root / "lib"), "COLUMNS": "200"}

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-c", "from so8t.cli import main; main()", *words]

    def so8t(self, *words: str) -> subprocess.CompletedProcess:
        "The command, to its end."
        return subprocess.run(
            self.command(*words), cwd=self.root, env=self.env, capture_output=True, text=True, timeout=120
        )

    def start(self, *words: str) -> subprocess.Popen:
        "The command, left running in a process group of its own."
        out = (self.root / "out.txt").open("ab")
        return subprocess.Popen(
            self.command(*words), cwd=self.root, env=self.env, stdout=out, stderr=out, start_new_session=True
        )

    def pids(self) -> dict[str, int]:
        "The processes of the waiting `grow`, once it waits."
        return wait_for(lambda: next((json.loads(p.read_text()) for p in self.runs.glob("*/pids.json")), None))

    def forget_pids(self):
        for file in self.runs.glob("*/pids.json"):
            file.unlink()

    def plan(self, *words: str) -> dict[str, str]:
        "What the dry run says of each stage."
        return {
            s["stage"]: s["action"]
            for s in json.loads(self.so8t("run", "--dry-run", "--json", *words).stdout)["stages"]
        }

    def status(self) -> dict:
        return json.loads(self.so8t("status", "--json").stdout)

    def events(self, kind: str) -> list[dict]:
        "The events of that kind in the newest run."
        file = max(self.runs.glob("*/events.jsonl"))
        return [e for e in map(json.loads, file.read_text(encoding="utf-8").splitlines()) if e["event"] == kind]

    def digests(self) -> dict[str, str]:
        "Content digest of each artifact of the newest run."
        run = max(self.runs.glob("*/events.jsonl")).parent
        return {
            p.parts[-3]: json.loads(p.read_text())["digest"] for p in sorted(run.glob("artifacts/*/*/manifest.json"))
        }


def wait_for(look, patience: float = 60):
    "Look until there is something to see."
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def gone(*pids: int) -> bool:
    "Whether all these processes are dead (a zombie is dead)."
    for pid in pids:
        try:
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                return False
        except psutil.NoSuchProcess:
            continue
    return True
