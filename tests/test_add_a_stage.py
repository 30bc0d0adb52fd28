"The how-to is followed as it stands: its cells make the notebook, its blocks the file and the commands."

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from so8t.flow import config as configs
from so8t.flow import plan, runner, session
from so8t.flow.problem import Problem
from so8t.flow.stage import open_stage

ROOT = Path(__file__).parents[1]
PAGE = json.loads((ROOT / "nbs" / "add_a_stage.ipynb").read_text(encoding="utf-8"))
TEXT = "\n".join("".join(c["source"]) for c in PAGE["cells"] if c["cell_type"] == "markdown")
CODE = [{**c, "outputs": []} for c in PAGE["cells"] if c["cell_type"] == "code"]


def blocks(language: str) -> list[str]:
    "The fenced blocks of the page in a language."
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def commands() -> list[tuple[list[str], str]]:
    "The commands of the page, each with what it is said to answer."
    found = [block.removeprefix("$ so8t ").partition("\n") for block in blocks("console")]
    return [(command.split(), answer) for command, _, answer in found]


class Newcomer:
    "A workspace fresh from a clone, in which the page is followed."

    def __init__(self, root: Path):
        self.root, self.file, self.notebook = root, root / "configs" / "my.yaml", root / "nbs/stages/wordcount.ipynb"
        self.file.parent.mkdir(parents=True)
        self.notebook.parent.mkdir(parents=True)
        shutil.copy(ROOT / "settings.ini", root)
        for name in ("collect", "cleanse"):
            shutil.copy(ROOT / "nbs" / "stages" / f"{name}.ipynb", self.notebook.parent)
        self.follow()

    def follow(self):
        "The configuration and the notebook, as the page has them."
        self.file.write_text(blocks("yaml")[0], encoding="utf-8")
        self.write(CODE)

    def write(self, cells: list[dict]):
        kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}}
        nb = {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
        self.notebook.write_text(json.dumps(nb), encoding="utf-8")

    def run(self, *command: str) -> subprocess.CompletedProcess:
        env = {**os.environ, "COLUMNS": "100"}
        return subprocess.run(command, cwd=self.root, env=env, capture_output=True, text=True, encoding="utf-8")

    def so8t(self, *words: str) -> subprocess.CompletedProcess:
        return self.run(sys.executable, "-c", "from so8t.cli import main; main()", *words)

    def plan(self) -> list[plan.Step]:
        "What a new run would do."
        workspace = configs.workspace()
        return plan.plan(runner.fresh_scene(workspace, configs.load(self.file), runner.Wish()))


def timeless(text: str) -> str:
    "A text without its times and its layout."
    text = re.sub(r"\d{8}-\d{6}(-\d+)?", "RUN", text)
    text = re.sub(r"\b\d{2}:\d{2}:\d{2}\b", "TIME", text)
    return " ".join(re.sub(r"[─…]", " ", text).split())


@pytest.fixture(scope="module")
def followed(tmp_path_factory) -> tuple[Newcomer, list[str]]:
    "The workspace after all commands of the page, and what each answered."
    newcomer = Newcomer(tmp_path_factory.mktemp("newcomer"))
    answers = []
    for command, _ in commands():
        done = newcomer.so8t(*command)
        assert done.returncode == 0, (command, done.stdout + done.stderr)
        answers.append(done.stdout)
    return newcomer, answers


@pytest.fixture
def newcomer(followed, monkeypatch) -> Newcomer:
    "The same workspace, mended after each test; nobody waits for a lock."
    monkeypatch.setenv("SO8T_WORKSPACE", str(followed[0].root))
    lock = session.try_lock
    monkeypatch.setattr(session, "try_lock", lambda run, name, patience: lock(run, name, 0))
    yield followed[0]
    followed[0].follow()


def test_the_commands_answer_what_the_page_says(followed):
    assert len(commands()) == 4
    for (command, said), answer in zip(commands(), followed[1], strict=True):
        assert timeless(said) == timeless(answer), command


def test_the_stage_publishes_what_the_page_says(newcomer):
    artifact = newcomer.plan()[-1].artifact
    counts = json.loads((artifact / "wordcount.json").read_text(encoding="utf-8"))
    assert counts and min(map(len, counts)) == 6 and artifact.parent.name == "wordcount"
    assert next(newcomer.root.glob("runs/*/notebooks/wordcount.html")).stat().st_size > 10_000


def test_plain_papermill_runs_it_too(newcomer):
    before = newcomer.plan()[-1].artifact
    words = ["nbs/stages/wordcount.ipynb", "out.ipynb", "-p", "config", "configs/my.yaml", "--no-progress-bar"]
    done = newcomer.run(sys.executable, "-m", "papermill", *words)
    assert done.returncode == 0, done.stderr
    assert "(finished, reads cleanse)" in (newcomer.root / "out.ipynb").read_text(encoding="utf-8")
    assert newcomer.plan()[-1].artifact == before


def untagged(newcomer):
    newcomer.write([{**CODE[0], "metadata": {}}, *CODE[1:]])
    newcomer.plan()


def no_literals(newcomer):
    newcomer.write([CODE[0], {**CODE[1], "source": "reads = list('ab')\nuses = []"}, *CODE[2:]])
    newcomer.plan()


def edited(newcomer, old: str, new: str):
    newcomer.file.write_text(newcomer.file.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    newcomer.plan()


def opened(uses=("custom.wordcount",), run: str = ""):
    return open_stage("wordcount", "configs/my.yaml", run, ["cleanse"], uses)


def another_kernel(newcomer):
    "Two notebooks open one run."
    edited(newcomer, "letters: 6", "letters: 5")
    first = opened(run="my-20261121-000000")
    assert session.holder(first.run, "stage")
    opened(run="my-20261121-000000")


def older_run(newcomer):
    edited(newcomer, ", wordcount]", "]")
    session.create(configs.workspace(), configs.load(newcomer.file), "my-20261121-000001")
    newcomer.follow()
    opened(run="my-20261121-000001")


def nothing_finished(newcomer):
    edited(newcomer, "custom:", "data: {max_characters: 77}\ncustom:")
    opened(run="my-20261121-000002")


MISTAKES = {
    "cell tagged `parameters`": untagged,
    "nothing but lists": no_literals,
    "unknown stage wordcout": lambda n: edited(n, ", wordcount]", ", wordcout]"),
    "must come before it": lambda n: edited(n, "collect, cleanse, wordcount", "wordcount, collect, cleanse"),
    "has no such key": lambda n: edited(n, "wordcount: {", "wordcounts: {"),
    "did you mean custom?": lambda n: edited(n, "custom:", "custum:"),
    "without declaring it": lambda n: opened().config.data,
    "save the notebook": lambda n: opened(uses=["data"]),
    "is not finished": nothing_finished,
    "has no stage wordcount": older_run,
    "close its kernel first": another_kernel,
}


def table() -> list[str]:
    "The rows of the page's table of mistakes."
    return [row for row in TEXT.partition("| what it says |")[2].splitlines() if row.startswith("| ")]


@pytest.mark.parametrize("part", MISTAKES)
def test_each_mistake_says_what_the_page_says(newcomer, part):
    said = [row.split(" | ")[0].removeprefix("| ") for row in table() if part in row]
    assert len(said) == 1, said
    with pytest.raises(Problem) as problem:
        MISTAKES[part](newcomer)
    assert said[0] in str(problem.value)


def test_every_mistake_of_the_page_is_tried():
    assert len(table()) == len(MISTAKES)


def test_a_run_holds_what_the_plan_of_the_house_says(followed):
    house = (ROOT / "nbs" / "architecture.ipynb").read_text(encoding="utf-8")
    run = max(followed[0].root.glob("runs/my-2*/events.jsonl")).parent
    for path in run.iterdir():
        assert path.name in house, path.name
