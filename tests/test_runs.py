"Runs of real notebooks that are killed, asked to stop, started twice, and changed under way."

import json
import os
import signal
import subprocess

import psutil
import pytest
from garden import GROW, GROWN, SEED, Garden, gone, wait_for, write_notebook

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")


@pytest.fixture
def garden(tmp_path) -> Garden:
    return Garden(tmp_path)


def finish(garden: Garden):
    "The same command goes on to the end."
    garden.rain()
    done = garden.so8t("run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert garden.status()["status"] == "completed"


def runner_alone(runner, pids):
    os.kill(runner.pid, signal.SIGKILL)


def whole_group(runner, pids):
    os.killpg(runner.pid, signal.SIGKILL)


@pytest.mark.parametrize("kill", [runner_alone, whole_group])
def test_no_kernel_outlives_its_runner(garden, kill):
    garden.drought()
    runner = garden.start("run")
    pids = garden.pids()
    kill(runner, pids)
    runner.wait()
    wait_for(lambda: gone(*pids.values()), patience=10)
    assert garden.status()["status"] == "interrupted" and garden.status()["cause"] == "crash"
    garden.forget_pids()
    finish(garden)
    assert [e["stage"] for e in garden.events("stage_started")] == ["seed", "grow", "grow", "pick"]


def test_a_kernel_killed_alone_is_started_again(garden):
    garden.drought()
    runner = garden.start("run")
    pids = garden.pids()
    garden.forget_pids()
    os.kill(pids["kernel"], signal.SIGKILL)
    again = garden.pids()
    assert again["kernel"] != pids["kernel"] and gone(pids["child"])
    garden.rain()
    assert runner.wait(60) == 0
    assert [e["how"] for e in garden.events("stage_ended")] == ["dead kernel"]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_is_interrupted_and_goes_on(garden, signum):
    garden.drought()
    runner = garden.start("run")
    pids = garden.pids()
    os.kill(runner.pid, signum)
    assert runner.wait(60) == 75
    assert gone(*pids.values())
    assert garden.status()["status"] == "interrupted" and garden.status()["cause"] == "asked to stop"
    kept = next(garden.runs.glob("*/notebooks/grow.html")).read_text(encoding="utf-8")
    assert "Interrupted: it was asked to stop" in kept
    finish(garden)
    assert [e["stage"] for e in garden.events("stage_started")].count("seed") == 1


def test_a_second_runner_says_who_runs_it_and_leaves(garden):
    garden.drought()
    first = garden.start("run")
    garden.pids()
    second = garden.so8t("run")
    assert second.returncode == 0 and f"executed by process {first.pid}" in second.stdout
    assert len(garden.events("run_started")) == 1
    garden.rain()
    assert first.wait(60) == 0


def test_two_runners_at_the_same_instant_make_one_run_at_a_time(garden):
    both = [garden.start("run"), garden.start("run")]
    assert [p.wait(120) for p in both] == [0, 0]
    assert len(list(garden.runs.glob("garden-*"))) == 1
    assert garden.status()["status"] == "completed"
    assert [e["stage"] for e in garden.events("stage_started")] == ["seed", "grow", "pick"]


def test_a_run_that_was_killed_while_it_was_made_is_none(garden):
    assert garden.so8t("run", "--until", "seed").returncode == 0
    next(garden.runs.glob("*/config.yaml")).unlink()
    assert garden.so8t("run").returncode == 0
    assert garden.status()["status"] == "completed"


def test_a_page_that_a_kill_kept_from_being_made_is_made_by_the_same_command(garden):
    assert garden.so8t("run", "--until", "seed").returncode == 0
    first = next(garden.runs.glob("*/notebooks/seed.html"))
    first.unlink()
    assert garden.so8t("run").returncode == 0 and first.is_file(), "in a run that was unfinished"
    page = next(garden.runs.glob("*/notebooks/grow.html"))
    page.unlink()
    again = garden.so8t("run")
    assert again.returncode == 0 and "completed and nothing has changed" in again.stdout
    assert "jp-Notebook" in page.read_text(encoding="utf-8")


def test_an_unfinished_run_goes_on_although_the_clock_was_set_back_before_it_was_made(garden):
    garden.config.write_text(garden.config.read_text().replace("[seed, grow, pick]", "[seed]"))
    assert garden.so8t("run").returncode == 0
    first = next(garden.runs.glob("garden-*"))
    first.rename(first.with_name("garden-29990101-000000"))
    garden.config.write_text(garden.config.read_text().replace("[seed]", "[seed, grow]").replace("oak", "ash"))
    assert garden.so8t("run", "--until", "seed").returncode == 0
    assert garden.so8t("run").returncode == 0
    assert len(list(garden.runs.glob("garden-*"))) == 2
    assert garden.status()["status"] == "completed"


def test_session_json_is_only_a_view(garden):
    assert garden.so8t("run", "--until", "seed").returncode == 0
    view = next(garden.runs.glob("*/session.json"))
    view.write_text('{"status": "comp', encoding="utf-8")
    assert garden.status()["status"] == "partial"
    view.unlink()
    finish(garden)
    assert json.loads(view.read_text(encoding="utf-8"))["status"] == "completed"


def test_a_cell_that_hangs_is_timed_out(garden):
    garden.drought()
    garden.config.write_text(
        garden.config.read_text().replace("timeout: 0", "timeout: 3").replace("retries: 1", "retries: 0")
    )
    run = garden.so8t("run")
    assert run.returncode == 1
    assert [e["how"] for e in garden.events("stage_ended")] == ["timeout"]
    assert garden.status()["status"] == "failed"


def test_a_stage_that_publishes_nothing_has_not_finished(garden):
    write_notebook(garden.root, "seed", [], ["custom.seed"], "import sys; sys.exit(0)", SEED)
    assert garden.so8t("run").returncode == 1
    assert [e["how"] for e in garden.events("stage_ended")] == ["exit", "exit"]
    write_notebook(garden.root, "seed", [], ["custom.seed"], "1 + 1")
    assert garden.so8t("run", "--new").returncode == 1
    assert garden.events("stage_ended")[0]["how"] == "unpublished"


RUN, REUSE = "run", "reuse"


def notebook_code(garden):
    write_notebook(garden.root, "grow", ["seed"], ["custom.grow"], GROW, GROWN.replace(", grown", ", tall"))


def markdown(garden):
    write_notebook(garden.root, "grow", ["seed"], ["custom.grow"], GROW, GROWN, note="# Another title")


def own_config(garden):
    garden.config.write_text(garden.config.read_text().replace("kind: oak", "kind: ash"))


def other_config(garden):
    garden.config.write_text(garden.config.read_text().replace("grace: 20", "grace: 21"))


def reached_module(garden):
    module = garden.root / "lib" / "so8t" / "data" / "verdict.py"
    module.write_text(module.read_text(encoding="utf-8") + "\nANOTHER = 1\n", encoding="utf-8")


def comment_in_module(garden):
    module = garden.root / "lib" / "so8t" / "data" / "verdict.py"
    module.write_text(module.read_text(encoding="utf-8") + "\n# %% another comment\n", encoding="utf-8")


@pytest.mark.parametrize(
    "change, plan",
    [
        (notebook_code, [REUSE, RUN, RUN]),
        (own_config, [RUN, RUN, RUN]),
        (reached_module, [REUSE, REUSE, RUN]),
        (markdown, [REUSE] * 3),
        (other_config, [REUSE] * 3),
        (comment_in_module, [REUSE] * 3),
    ],
)
def test_a_change_runs_exactly_what_depends_on_it(garden, change, plan):
    assert garden.so8t("run").returncode == 0
    assert list(garden.plan().values()) == [REUSE] * 3
    change(garden)
    assert list(garden.plan().values()) == plan
    before = len(list(garden.runs.iterdir()))
    assert garden.so8t("run").returncode == 0
    assert len(list(garden.runs.iterdir())) - before == int(RUN in plan)
    if RUN in plan:
        assert [e["stage"] for e in garden.events("stage_started")] == [
            s for s, a in zip(("seed", "grow", "pick"), plan, strict=True) if a == RUN
        ]


def test_a_run_goes_on_with_the_code_and_the_configuration_that_it_froze(garden):
    assert garden.so8t("run", "--until", "seed").returncode == 0
    own_config(garden)
    write_notebook(garden.root, "grow", ["seed"], ["custom.grow"], "1 / 0")
    done = garden.so8t("run")
    assert done.returncode == 0 and "custom.seed.kind: oak → ash" in done.stdout
    assert [e["stage"] for e in garden.events("stage_started")] == ["seed", "grow", "pick"]


def test_damage_is_named_and_made_good(garden):
    assert garden.so8t("run").returncode == 0
    file = next(garden.runs.glob("*/artifacts/grow/*/result.txt"))
    file.write_text("an oak, gnawed")
    found = garden.so8t("verify")
    assert found.returncode == 3 and "artifacts/grow" in found.stdout and "result.txt" in found.stdout
    assert garden.status()["stages"][1]["status"] != "finished"
    assert garden.so8t("run").returncode == 0
    assert garden.so8t("verify").returncode == 0
    assert [e["stage"] for e in garden.events("stage_started")] == ["seed", "grow", "pick", "grow"]


def test_plain_papermill_runs_a_stage_notebook(garden):
    for name in ("seed", "grow", "pick"):
        words = [
            garden.root / "stages" / f"{name}.ipynb",
            garden.root / f"{name}.ipynb",
            "-p",
            "run",
            "by-hand",
            "-k",
            "python3",
        ]
        subprocess.run(
            [psutil.sys.executable, "-m", "papermill", *words],
            cwd=garden.root,
            env=garden.env,
            check=True,
            capture_output=True,
        )
    assert garden.so8t("status", "by-hand", "--json").returncode == 0
    assert json.loads(garden.so8t("status", "by-hand", "--json").stdout)["status"] == "completed"


def test_a_finished_run_imports_neither_torch_nor_papermill(garden):
    assert garden.so8t("run").returncode == 0
    code = (
        "import sys\nfrom so8t.cli import app\nsys.argv = ['so8t', 'run']\ntry: app()\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'papermill', 'nbformat') if m in sys.modules])"
    )
    said = subprocess.run(
        [psutil.sys.executable, "-c", code], cwd=garden.root, env=garden.env, capture_output=True, text=True
    )
    assert "nothing has changed" in said.stdout and said.stdout.rstrip().endswith("[]"), said.stderr


TRAIN = """import time
from so8t.train import units
from so8t.train.checkpoint import Checkpointer, rng_state, set_rng_state

class Counting:
    done, total, changing = 0, 400, False
    def unit(self):
        time.sleep(0.02)
        self.done += 1
        stage.progress(self.done, self.total)
        return {"step": self.done}
    def state(self):
        return {"done": self.done}
    def load(self, state):
        self.done = state["done"]

work = Counting()
units.run(work, Checkpointer(stage.checkpoints, stage.identity(), every=600), stage.metrics)"""


def test_a_checkpoint_is_made_when_asked_for_and_can_be_resumed_from(garden):
    write_notebook(garden.root, "grow", ["seed"], ["custom.grow"], TRAIN, GROWN)
    assert "in no training" in garden.so8t("run", "--until", "seed").stderr + garden.so8t("checkpoint").stderr
    runner = garden.start("run")
    progress = wait_for(lambda: next(garden.runs.glob("*/progress.json"), None))
    wait_for(lambda: json.loads(progress.read_text())["done"] > 20)
    asked = garden.so8t("checkpoint")
    assert asked.returncode == 0 and asked.stdout.strip().endswith("-rolling"), asked.stderr
    rolling = asked.stdout.strip().rpartition("/")[2]
    busy = garden.so8t("run", "--resume-from", f"grow/{rolling}")
    assert "already" in busy.stdout + busy.stderr or "is being executed" in busy.stdout + busy.stderr
    os.kill(runner.pid, signal.SIGINT)
    assert runner.wait(60) == 75
    folder = progress.parent / "checkpoints" / "grow"
    emergency, = (c.name for c in folder.glob("*-emergency"))
    assert "damaged" not in garden.so8t("verify").stdout.replace("0 damaged", "")
    wrong = garden.so8t("run", "--resume-from", "grow/7")
    assert wrong.returncode == 2 and f"grow/{rolling}" in wrong.stderr
    done = garden.so8t("run", "--resume-from", f"grow/{rolling}")
    assert done.returncode == 0 and f"grow goes on from {rolling}; set aside: {emergency}" in done.stdout, done.stderr
    steps = [json.loads(line)["step"] for line in (progress.parent / "metrics" / "grow.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 401))
    resumed = (progress.parent / "metrics" / "grow.resumed.jsonl").read_text()
    assert json.loads(resumed.splitlines()[-1])["step"] == int(rolling.split("-")[0])
