"Labels: votes over random rows, agreement against textbook values, and the queue run by real papermill."

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from so8t.data import label, sources
from so8t.data.row import id_of, read_rows
from so8t.data.verdict import Verdict
from so8t.flow import disk
from so8t.flow.problem import Problem

WORDS = [*map(str, Verdict), "MAYBE", "allow", ""]


def row(i, verdict=None, prompt=None, **more):
    found = {"lang": "en", "area": "everyday", "prompt": prompt or f"ask {i}", "verdict": verdict, "labeller": None}
    return found | {"id": id_of(found)} | more


def vote(i, who, verdict):
    return {"id": row(i)["id"], "labeller": who, "verdict": verdict}


def test_the_table_of_public_labels_is_whole():
    table = label.read_table()
    for name, public in sources.PUBLIC.items():
        assert set(table[name]) == set(public.verdicts)
        for word, said in table[name].items():
            assert (said["verdict"], said["area"]) == (public.verdicts[word], public.areas[word])
    marked = [(name, word) for name, labels in table.items() for word, said in labels.items() if said["nsfw"]]
    assert marked == [("strongreject", "Sexual content")]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"verdict": "BLOCK", "area": "crime"}, "labels.json: mine: 'bad': 'BLOCK' is no verdict; it must be one of"),
        ({"verdict": "DENY"}, "labels.json: mine: 'bad' needs a verdict and an area"),
        ({"verdict": "DENY", "area": "crime", "lang": "en"}, "labels.json: mine: 'bad' needs a verdict and an area"),
        ("DENY", "labels.json: mine: 'bad' needs a verdict and an area"),
    ],
)
def test_a_bad_table_is_one_clear_line(tmp_path, said, expected):
    (tmp_path / "labels.json").write_text(json.dumps({"mine": {"bad": said}}), encoding="utf-8")
    with pytest.raises(Problem, match=expected):
        label.read_table(tmp_path / "labels.json")


@st.composite
def scenes(draw):
    "Rows with and without a verdict, votes and answers; some words are no verdict, some ids are of no row."
    fine = st.sampled_from(list(map(str, Verdict)))
    rows = [row(i, draw(st.none() | fine), labeller="source:own") for i in range(draw(st.integers(1, 6)))]
    number, word = st.integers(0, 7), st.sampled_from(WORDS)
    votes = st.builds(vote, number, st.sampled_from(["agent:a", "agent:b", "model:m"]), word)
    answers = st.builds(vote, number, st.sampled_from(["person:x", "person:y"]), word)
    return rows, draw(st.lists(votes, max_size=12)), draw(st.lists(answers, max_size=4))


@settings(max_examples=200, deadline=None)
@given(scenes())
def test_settling_keeps_its_promises(scene):
    rows, votes, answers = scene
    settled, queued, refused = label.settle(rows, votes, answers)
    ids = [{r["id"] for r in part} for part in (settled, queued, refused)]
    assert ids[0] | ids[1] | ids[2] == {r["id"] for r in rows}
    assert not ids[2] & (ids[0] | ids[1])
    assert all(r["verdict"] in list(Verdict) for r in settled)
    last = {a["id"]: a for a in answers}
    given_ = {r["id"]: r for r in rows}
    for r in settled:
        if r["id"] in last:
            assert (r["verdict"], r["labeller"]) == (last[r["id"]]["verdict"], last[r["id"]]["labeller"])
            assert r["id"] not in ids[1]
        elif r["id"] in ids[1]:
            assert r == given_[r["id"]]
        assert r | {"verdict": None, "labeller": None} == given_[r["id"]] | {"verdict": None, "labeller": None}
    for record in refused:
        assert "which is no verdict" in record["reason"]


def test_an_unknown_label_stops_its_row_and_no_other():
    rows = [row(i, "ALLOW") for i in range(3)]
    settled, queued, refused = label.settle(rows, [vote(1, "agent:a", "Allowed")], [])
    assert [r["id"] for r in settled] == [rows[0]["id"], rows[2]["id"]] and queued == []
    assert refused == [{"id": rows[1]["id"], "reason": "agent:a said 'Allowed', which is no verdict"}]


def test_a_judge_votes_where_it_is_sure_and_what_is_no_distribution_is_refused():
    rows = [row(i) for i in range(5)]
    odds = [[0.1, 0.1, 0.1, 0.7], [0.4, 0.3, 0.2, 0.1], [np.nan] * 4, [2, 0, 0, 0], [-1, 2, 0, 0]]
    votes, refused = label.judged(rows, lambda prompts: np.array(odds), "model:x")
    assert [(v["id"], v["verdict"]) for v in votes] == [(rows[0]["id"], "REFUSE")]
    assert [r["id"] for r in refused] == [r["id"] for r in rows[2:]]
    assert label.judged([], lambda prompts: [], "model:x") == ([], [])


def test_kappas_are_those_of_the_papers():
    table = np.repeat([[0, 0], [0, 1], [1, 0], [1, 1]], [20, 5, 10, 15], axis=0)
    assert label.cohen(table) == pytest.approx(0.4)
    three = np.array([[0, 0, 0], [0, 0, 1], [1, 1, 1], [3, 3, 2]])
    counts = np.array([[3, 0, 0, 0], [2, 1, 0, 0], [0, 3, 0, 0], [0, 0, 1, 2]])
    within = ((counts**2).sum(1) - 3) / 6
    chance = ((counts.sum(0) / 12) ** 2).sum()
    assert label.fleiss(three) == pytest.approx((within.mean() - chance) / (1 - chance))


def test_agreement_of_those_who_never_differ_is_not_made_up():
    same = [vote(i, who, "ALLOW") for i in range(5) for who in ("a", "b")]
    (pair,) = label.agreement(same)
    assert (pair["kappa"], pair["low"], pair["rows"]) == (None, None, 5)
    apart = [vote(0, "a", "ALLOW"), vote(1, "b", "DENY")]
    assert label.agreement(apart)[0] | {"measure": ""} == {
        "labellers": "a / b", "measure": "", "rows": 0, "kappa": None, "low": None, "high": None}


def test_the_interval_of_agreement_holds_the_truth_nineteen_times_in_twenty():
    dice, held = np.random.default_rng(0), []
    for _ in range(20):
        truth = dice.integers(4, size=150)
        said = np.where(dice.random((150, 2)) < 0.7, truth[:, None], dice.integers(4, size=(150, 2)))
        votes = [vote(i, "ab"[j], list(Verdict)[said[i, j]]) for i in range(150) for j in range(2)]
        (pair,) = label.agreement(votes, 100)
        held.append(pair["low"] <= 0.49 <= pair["high"])
    assert sum(held) >= 17


HOSTILE = "Ignore this.\n```\n</pre><script>alert(1)</script>\n~~~~\n# no heading\n$x$ {rows} \\ \"quotes\""


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "labels"


def ask(folder, rows, votes=()):
    return nbformat.read(label.queue(folder / "answers.jsonl", rows, list(votes)), as_version=4)


def fill(folder, **words):
    "Type verdicts into the cells of the queue, as a person does."
    path = folder / "queue.ipynb"
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if match := re.fullmatch(r'label\("(\w+)", ".*"\)', cell.source):
            cell.source = f'label("{match[1]}", "{words[match[1]]}")' if match[1] in words else cell.source
    nbformat.write(notebook, path)


def work(folder, **parameters):
    return papermill.execute_notebook(
        folder / "queue.ipynb", folder / "done.ipynb", parameters, cwd=folder, progress_bar=False)


def test_answers_flow_from_the_queue_back_into_the_rows(folder):
    rows = [row(0, "ALLOW"), row(1, prompt=HOSTILE), row(2, prompt="猫に玉ねぎをあげていい？", lang="ja"), row(3)]
    votes = [vote(0, "agent:a", "DENY"), {"id": rows[1]["id"], "labeller": "agent:a", "verdict": "REFUSE"},
             {"id": rows[1]["id"], "labeller": "agent:b", "verdict": "DENY"}]
    settled, queued, _ = label.settle(rows, votes, [])
    assert [r["id"] for r in queued] == [r["id"] for r in rows] and len(settled) == 1
    ask(folder, queued, votes)
    fill(folder, **{rows[0]["id"]: "ALLOW", rows[1]["id"]: "REFUSE", rows[2]["id"]: "ESCALATION"})
    work(folder, alias="taro")
    answers = label.read_answers(folder / "answers.jsonl")
    settled, queued, refused = label.settle(rows, votes, answers)
    assert [(r["verdict"], r["labeller"]) for r in settled] == [
        (verdict, "person:taro") for verdict in ("ALLOW", "REFUSE", "ESCALATION")]
    assert [r["id"] for r in queued] == [rows[3]["id"]] and refused == []


def test_an_unknown_label_is_one_line_in_its_cell_and_what_was_answered_before_is_kept(folder):
    rows = [row(0), row(1), row(2)]
    ask(folder, rows)
    fill(folder, **{rows[0]["id"]: "DENY", rows[1]["id"]: "MAYBE", rows[2]["id"]: "ALLOW"})
    with pytest.raises(papermill.PapermillExecutionError):
        work(folder, alias="hanako")
    done = nbformat.read(folder / "done.ipynb", as_version=4)
    (error,) = [o for c in done.cells for o in c.get("outputs", []) if o.output_type == "error"]
    said = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(error.traceback)).strip()
    assert said == f"Problem: {rows[1]['id']}: 'MAYBE' is no verdict; it must be one of ALLOW, ESCALATION, DENY, REFUSE"
    assert [v["id"] for v in label.read_answers(folder / "answers.jsonl")] == [rows[0]["id"]]


def test_a_queue_written_again_is_the_same_and_loses_no_answer(folder):
    rows = [row(i) for i in range(4)]
    votes = [vote(0, "agent:a", "DENY")]
    ask(folder, rows[:3], votes)
    first = (folder / "queue.ipynb").read_bytes()
    ask(folder, rows[:3], votes)
    assert (folder / "queue.ipynb").read_bytes() == first
    label.answer(folder / "answers.jsonl", "taro", rows[2]["id"], "REFUSE")
    fill(folder, **{rows[1]["id"]: "DENY"})
    cells = {cell.id: cell.source for cell in ask(folder, rows[1:], votes).cells}
    assert [cells[f"label-{r['id']}"] for r in rows[1:]] == [
        f'label("{r["id"]}", "{word}")' for r, word in zip(rows[1:], ("DENY", "REFUSE", ""), strict=True)]
    cells = {cell.id: cell.source for cell in ask(folder, rows[3:], votes).cells}
    typed, recorded, asked = (f"label-{r['id']}" for r in rows[1:])
    assert cells[typed] == f'label("{rows[1]["id"]}", "DENY")' and rows[1]["prompt"] in cells[f"row-{rows[1]['id']}"]
    assert recorded not in cells and asked in cells


def test_a_prompt_is_shown_as_text_and_nothing_else(folder):
    cells = ask(folder, [row(0, prompt=HOSTILE)]).cells
    (shown,) = [c.source for c in cells if c.id.startswith("row-")]
    fence = re.search(r"^(`+)text$", shown, re.MULTILINE)[1]
    assert f"{fence}text\n{HOSTILE}\n{fence}\n" in shown and fence not in HOSTILE


def test_a_queue_that_cannot_be_read_is_not_overwritten(folder):
    disk.write_text(folder / "queue.ipynb", '{"cells": [')
    with pytest.raises(Problem, match="queue.ipynb: is no notebook, and may hold answers; move it away"):
        ask(folder, [row(0)])
    assert (folder / "queue.ipynb").read_text() == '{"cells": ['


def test_answers_survive_a_torn_line_and_the_last_one_counts(folder):
    path = folder / "answers.jsonl"
    for word in ("ALLOW", "DENY"):
        label.answer(path, "taro", "r1", word)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"id": "r1", "labeller": "pers')
    assert label.read_answers(path) == [{"id": "r1", "labeller": "person:taro", "verdict": "DENY"}]
    label.answer(path, "hanako", "r1", "REFUSE")
    assert label.read_answers(path) == [{"id": "r1", "labeller": "person:hanako", "verdict": "REFUSE"}]
    disk.append_jsonl(path, {"who": "taro"})
    with pytest.raises(Problem, match="answers.jsonl: line 4 needs an id, a labeller and a verdict"):
        label.read_answers(path)


@pytest.mark.parametrize("alias", ["", "a b", "person:taro", "a\n"])
def test_an_alias_is_one_word(tmp_path, alias):
    with pytest.raises(Problem, match="must be one word"):
        label.answer(tmp_path / "answers.jsonl", alias, "r1", "ALLOW")
    assert not (tmp_path / "answers.jsonl").exists()


ROOT = Path(__file__).parents[1]
ASKED = [("a", "Say a rude word to my neighbour.", "DENY"), ("b", "say a rude word to my  neighbour.", "ALLOW"),
         ("c", "May I park in front of a fire station?", None), ("d", "Which herbs grow on a balcony?", "ALLOW")]


class Workspace:
    "Stages collect and cleanse over four rows: two contradict each other, one has no verdict."

    def __init__(self, root: Path):
        self.root, self.answers = root, root / "labels" / "answers.jsonl"
        for folder in ("configs", "nbs/stages"):
            (root / folder).mkdir(parents=True)
        shutil.copy(ROOT / "settings.ini", root)
        for name in ("collect", "cleanse"):
            shutil.copy(ROOT / "nbs" / "stages" / f"{name}.ipynb", root / "nbs" / "stages")
        config = "name: my\nstages: [collect, cleanse]\ndata: {sources: [mine.jsonl]}\n"
        (root / "configs" / "my.yaml").write_text(config)
        common = {"lang": "en", "area": "everyday", "licence": "MIT"}
        quad = dict.fromkeys(("task", "safety", "policy", "answer"), "hm") | {"final": "hm DENY"}
        rows = [common | {"id": key, "prompt": prompt, "verdict": verdict} | (quad if key == "a" else {})
                for key, prompt, verdict in ASKED]
        (root / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def so8t(self, *words: str) -> str:
        command = [sys.executable, "-c", "from so8t.cli import main; main()", *words]
        done = subprocess.run(command, cwd=self.root, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def executed(self) -> list[str]:
        "The stages that the newest run executed."
        events = map(json.loads, max(self.root.glob("runs/*/events.jsonl")).read_text().splitlines())
        return [event["stage"] for event in events if event["event"] == "stage_started"]

    def queued(self) -> list[str]:
        cells = nbformat.read(self.answers.with_name("queue.ipynb"), as_version=4).cells
        return [cell.id.removeprefix("label-") for cell in cells if cell.id.startswith("label-")]

    def rows(self) -> dict[str, dict]:
        artifact = max(self.root.glob("runs/*/artifacts/cleanse/*"), key=lambda path: path.stat().st_mtime)
        sides = [artifact / f"{side}.parquet" for side in ("train", "validation", "test")]
        return {row["key"]: row for side in sides for row in read_rows(side)}


def test_what_a_person_answers_is_the_label_in_the_next_run(tmp_path):
    workspace = Workspace(tmp_path)
    workspace.so8t("run", "configs/my.yaml")
    rude, parking = (row(0, prompt=prompt)["id"] for prompt in (ASKED[0][1], ASKED[2][1]))
    assert workspace.queued() == [rude, parking] and set(workspace.rows()) == {"d"}
    label.answer(workspace.answers, "taro", rude, "ALLOW")
    (first,) = workspace.root.glob("runs/my-*")
    status = json.loads(workspace.so8t("status", first.name, "--json"))["status"]
    assert status == "completed", "what runs goes on with the answers that it began with"
    workspace.so8t("run", "configs/my.yaml")
    assert workspace.executed() == ["cleanse"] and workspace.queued() == [parking]
    assert set(workspace.rows()) == {"a", "d"}
    said = workspace.rows()["a"]
    assert (said["verdict"], said["labeller"], said["final"]) == ("ALLOW", "person:taro", None)
