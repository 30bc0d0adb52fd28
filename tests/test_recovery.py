"Faults of every kind, real ones, in a stage that runs: it goes on and finishes, or stops with the sentence that helps."

import itertools
import json
import os
import random
import subprocess
from pathlib import Path

import pytest
from garden import GROWN, Garden, wait_for, write_notebook

from so8t.flow import recovery

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and devices of POSIX")
HUB = """import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
class Hub(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response({status})
        self.end_headers()
    def log_message(self, *_):
        pass
server = HTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
import huggingface_hub.constants
huggingface_hub.constants.HF_HUB_OFFLINE = False
huggingface_hub.HfApi(endpoint=f"http://127.0.0.1:{{server.server_port}}", token="x").model_info("nobody/none")"""
FAULTS = {
    "gpu memory": "import torch\nraise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')",
    "host memory": "import numpy\nnumpy.ones(1 << 46)",
    "disk full": "open('/dev/full', 'wb', buffering=0).write(b'a row')",
    "checkpoint": "import safetensors.torch\nsafetensors.torch.load(b'no header at all')",
    "not a number": "raise FloatingPointError('loss is nan after unit 7')",
    "hub authentication": HUB.format(status=401),
    "hub unavailable": HUB.format(status=503),
    "network": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:9/')",
    "missing package": "import no_such_package",
    "path or permission": "open('/no/such/folder/rows.jsonl')",
    "subprocess": "import subprocess\nsubprocess.run(['false'], check=True)",
    "dead kernel": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "unknown": "raise ValueError('a mistake')",
}
HOPELESS = {kind.kind for kind in recovery.kinds() if kind.attempts == 0}
HOOK = """from pathlib import Path
waiting = sorted(Path(stage.scene.root, "faults").glob(f"{stage.name}-*.py"))
source = waiting[0].read_text() if waiting else ""
if waiting:
    waiting[0].unlink()
exec(source)"""


def lay(root: Path, stage: str, kinds) -> None:
    "Put faults in the way of a stage: one for each attempt."
    (root / "faults").mkdir(exist_ok=True)
    for number, kind in enumerate(kinds):
        (root / "faults" / f"{stage}-{number}.py").write_text(FAULTS[kind], encoding="utf-8")


def test_every_kind_has_a_fault_here():
    assert set(FAULTS) == {kind.kind for kind in recovery.kinds()} | {"unknown"}


@pytest.fixture
def garden(tmp_path) -> Garden:
    garden = Garden(tmp_path)
    write_notebook(garden.root, "grow", ["seed"], ["custom.grow"], HOOK, GROWN)
    garden.config.write_text(garden.config.read_text().replace("backoff: 0.1", "backoff: 0.01"), encoding="utf-8")
    return garden


def survives(garden: Garden, kinds: tuple[str, ...]):
    "Errors are of their kinds; the run finishes, or stops at the first one that needs a person, and says why."
    lay(garden.root, "grow", kinds)
    run = garden.so8t("run")
    ends = garden.events("stage_ended")
    fatal = next((kind for kind in kinds if kind in HOPELESS), None)
    seen = kinds[: kinds.index(fatal) + 1] if fatal else kinds
    assert [e["kind"] for e in ends] == list(seen), run.stdout
    tried = garden.events("recovery")
    assert [e["kind"] for e in tried] == [kind for kind in seen if kind != fatal]
    assert run.returncode == (1 if fatal else 0), run.stdout + run.stderr
    if fatal:
        person = next(kind.person for kind in recovery.kinds() if kind.kind == fatal)
        assert person in run.stdout and ends[-1]["error"].startswith(person)
        for file in (garden.root / "faults").iterdir():
            file.unlink()
        assert garden.so8t("run").returncode == 0
    assert garden.events("run_ended")[-1]["status"] == "completed"


def test_faults_in_a_row(garden):
    survives(garden, ("network", "disk full", "host memory", "dead kernel", "missing package"))
    told = json.loads(garden.so8t("recover", "--scan", "--json").stdout)
    assert [row["kind"] for row in told][::4] == ["network", "missing package"]
    assert told[0]["came"] == "failed" and told[0]["tried"][0].startswith("waited") and "person" in told[4]["would"]


@pytest.mark.soak
@pytest.mark.parametrize("kind", FAULTS)
def test_each_fault(garden, kind):
    survives(garden, (kind,))


@pytest.mark.soak
@pytest.mark.parametrize("pair", random.Random(7).sample(list(itertools.permutations(FAULTS, 2)), 12), ids="+".join)
def test_pairs_of_faults(garden, pair):
    survives(garden, pair)


def test_attempts_are_bounded_and_an_old_log_line_counts_once(garden):
    "The first kernel prints that memory is short before it dies; the next ones die without a word: a dead kernel."
    lay(garden.root, "grow", ["dead kernel"] * 3)
    first = garden.root / "faults" / "grow-0.py"
    first.write_text("import os\nos.write(2, b'terminate called: std::bad_alloc\\n')\n" + first.read_text())
    run = garden.so8t("run")
    assert run.returncode == 1
    assert [e["kind"] for e in garden.events("stage_ended")] == ["host memory", "dead kernel", "dead kernel"]
    last = garden.events("stage_ended")[-1]["error"]
    assert last.startswith("the stage's process was ended from outside")
    assert last.endswith("(DeadKernelError: Kernel died)") and last in run.stdout


TRAIN = """import math, time
from so8t.train import units
from so8t.train.checkpoint import Checkpointer
import torch

class Learning:
    done, total, changing, micro_batch = 0, 40, False, 8
    def __init__(self):
        self.weight = torch.zeros(1, requires_grad=True)
        self.optimizer = torch.optim.SGD([self.weight], lr=1.0)
    def unit(self):
        time.sleep(0.01)
        if SHORT and self.micro_batch > 2:
            raise torch.OutOfMemoryError(f"CUDA out of memory with {self.micro_batch} rows")
        before = self.weight.item()
        self.optimizer.zero_grad()
        self.weight.sum().backward()
        self.changing = True
        self.optimizer.step()
        self.done, self.changing = self.done + 1, False
        step = before - self.weight.item()
        return {"step": self.done, "loss": math.nan if self.done == 25 and step > BAD else 0.5, "moved": step}
    def state(self):
        return {"done": self.done, "weight": self.weight.detach(), "micro_batch": self.micro_batch,
                "optimizer": self.optimizer.state_dict()}
    def load(self, state):
        self.done, self.micro_batch = state["done"], state["micro_batch"]
        self.weight.data.copy_(state["weight"])
    def shrink(self):
        self.micro_batch = max(1, self.micro_batch // 2)
        return self.micro_batch > 1

units.run(Learning(), Checkpointer(stage.checkpoints, stage.identity(), every=0.05, stall=0.9), stage.metrics)"""


def rows_of(garden: Garden) -> list[dict]:
    file = next(garden.runs.glob("*/metrics/grow.jsonl"))
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("bad, rates", [(0.6, [0.5]), pytest.param(0.3, [0.5, 0.25], marks=pytest.mark.soak)])
def test_a_loss_that_is_no_number_rewinds_and_slows_down(garden, bad, rates):
    "With a rate above `bad`, the loss is no number at step 25: back to a checkpoint before it, at half the rate."
    write_notebook(garden.root, "grow", ["seed"], ["custom.grow"], f"BAD, SHORT = {bad}, False", TRAIN, GROWN)
    assert garden.so8t("run").returncode == 0
    tried = garden.events("recovery")
    assert [e["kind"] for e in tried] == ["not a number"] * len(rates)
    assert [e["tried"][1] for e in tried] == [f"learning rate times {rate}" for rate in rates]
    assert all("set aside" in e["tried"][0] for e in tried)
    assert [e["after"]["rate"] for e in garden.events("adjusted")] == rates
    rows = rows_of(garden)
    assert [row["step"] for row in rows] == list(range(1, 41)) and rows[-1]["moved"] == rates[-1]
    assert {row["moved"] for row in rows} <= {1.0, *rates}
    made = json.loads(next(garden.runs.glob("*/artifacts/grow/*/manifest.json")).read_text(encoding="utf-8"))
    assert made["adjusted"]["slower"] == rates[-1], "another run that takes this artifact over can see it"


@pytest.mark.soak
def test_memory_that_is_short_halves_the_rows_in_the_kernel_and_when_asked(garden):
    "More than two rows at once are too many: found out by the training itself; and asked for one less, once."
    code = TRAIN.replace("units.run(", "recovery.ask(stage.checkpoints, 'memory is 97 % full', shrinks=1)\nunits.run(")
    setup = "BAD, SHORT = 3, True\nfrom so8t.flow import recovery"
    write_notebook(garden.root, "grow", ["seed"], ["custom.grow"], setup, code, GROWN)
    assert garden.so8t("run").returncode == 0
    told, = garden.events("adjusted")
    assert (told["before"]["rows_at_once"], told["after"]["rows_at_once"]) == (8, 4)
    assert told["why"] == "memory is 97 % full" and garden.events("recovery") == []


# ---- a disk that fills, and has room again ----

FILL = """import time
ballast = (stage.run_dir.parent / "ballast").open("wb", buffering=0)
try:
    while True:
        ballast.write(bytes(4096))
except OSError:
    time.sleep(1)
    raise"""


@pytest.fixture
def small_disk(tmp_path):
    "A file system of 12 MB; where it cannot be mounted, the test is skipped."
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("a file system can only be mounted by root")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.parametrize("least, said", [("64 KB", "paused: the disk has"), ("0", "waits for room on the disk")])
def test_a_full_disk_is_waited_for(garden, small_disk, least, said):
    "The measured disk pauses the stage; without that, the runner itself meets the full disk. Room comes back: the end."
    runs, settings = small_disk / "runs", garden.root / "settings.ini"
    settings.write_text(settings.read_text().replace("runs = runs", f"runs = {runs}"))
    text = garden.config.read_text().replace("free_disk: 1 MB", "free_disk: 0")
    text = text.replace("automation: {", f"automation: {{balance: {{free_disk: {least}}}, ")
    garden.config.write_text(text + "logging: {sample_seconds: 0.2}\n", encoding="utf-8")
    garden.runs = runs
    (garden.root / "faults").mkdir()
    (garden.root / "faults" / "grow-0.py").write_text(FILL)
    runner = garden.start("run")
    wait_for(lambda: said in (garden.root / "out.txt").read_text() or runner.poll() is not None)
    assert runner.poll() is None, (garden.root / "out.txt").read_text()
    os.truncate(runs / "ballast", 0)
    assert runner.wait(60) == 0, (garden.root / "out.txt").read_text()
    assert garden.events("run_ended")[-1]["status"] == "completed"
