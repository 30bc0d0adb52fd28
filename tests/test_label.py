"Labels: votes over random rows, agreement against textbook values, and the queue run by real papermill."

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.inter_rater import aggregate_raters, fleiss_kappa

from so8t.data import label, sources
from so8t.data.row import id_of, read_rows
from so8t.data.verdict import Verdict
from so8t.eval import backends
from so8t.flow import disk
from so8t.flow.problem import Problem


def row(i, verdict=None, prompt=None, **more):
    found = {"lang": "en", "area": "everyday", "prompt": prompt or f"ask {i}", "verdict": verdict, "labeller": None}
    return found | {"id": id_of(found)} | more


def test_every_label_of_a_public_set_has_a_verdict_and_an_area():
    assert set(sources.LABELS) == set(sources.PUBLIC)
    for name, public in sources.PUBLIC.items():
        assert set(public.areas) == set(public.verdicts) == set(sources.LABELS[name])
        assert set(public.verdicts.values()) <= set(Verdict)


WORDS = st.sampled_from([*map(str, Verdict), "MAYBE", "allow", "", None])


@st.composite
def scenes(draw):
    "What two labellers said of rows with and without a verdict; some words are no verdict, some are missing."
    size, fine = draw(st.integers(1, 6)), st.none() | st.sampled_from(list(map(str, Verdict)))
    columns = {"source": fine, "agent:a": WORDS, "model:m": WORDS}
    told = {name: draw(st.lists(words, min_size=size, max_size=size)) for name, words in columns.items()}
    return pd.DataFrame(told, [f"r{i}" for i in range(size)], dtype=object).rename_axis("id")


@settings(max_examples=200, deadline=None)
@given(scenes())
def test_settling_keeps_its_promises(said):
    votes, refused = label.heard(said)
    taken, disputed = label.settle(votes)
    strange = [(id_, who, word) for id_, words in said.iterrows() for who, word in words.items()
               if isinstance(word, str) and word not in list(Verdict)]
    assert sorted(refused.itertuples(index=False, name=None)) == sorted(strange)
    for id_, words in said.iterrows():
        given_, known = words[["agent:a", "model:m"]], {w for w in words if w in list(map(str, Verdict))}
        assert (id_ in disputed) == (len(known) > 1)
        all_alike = given_.nunique() == 1 and set(given_) <= set(map(str, Verdict))
        assert (id_ in taken) == (not isinstance(words["source"], str) and all_alike)
        if id_ in taken:
            assert taken[id_] == {"id": id_, "labeller": "agent:a, model:m", "verdict": given_.iloc[0]}


def test_the_widest_gap_is_looked_at_first():
    votes = {"source": ["ALLOW", "ALLOW", "DENY"], "agent:a": ["ESCALATION", "REFUSE", "DENY"]}
    assert label.settle(pd.DataFrame(votes, ["x", "y", "z"])) == ({}, ["y", "x"])


def test_kappas_are_those_of_the_papers():
    table = np.repeat([[0, 0], [0, 1], [1, 0], [1, 1]], [20, 5, 10, 15], axis=0)
    assert label.cohen(table) == pytest.approx(0.4)
    assert label.cohen(table[[0, 20, 25, 35]], np.array([20, 5, 10, 15])) == pytest.approx(0.4)
    three = np.array([[0, 0, 0], [0, 0, 1], [1, 1, 1], [3, 3, 2]])
    assert label.fleiss(three) == pytest.approx(fleiss_kappa(aggregate_raters(three, 4)[0]))
    assert label.fleiss(three, np.array([2, 1, 1, 3])) == pytest.approx(
        fleiss_kappa(aggregate_raters(np.repeat(three, [2, 1, 1, 3], axis=0), 4)[0]))


def test_agreement_of_those_who_never_differ_is_not_made_up():
    (pair,) = label.agreement(pd.DataFrame({"a": ["ALLOW"] * 5, "b": ["ALLOW"] * 5})).to_dict("records")
    assert pair["rows"] == 5 and np.isnan([pair["kappa"], pair["low"], pair["high"]]).all()
    (pair,) = label.agreement(pd.DataFrame({"a": ["ALLOW", None], "b": [None, "DENY"]})).to_dict("records")
    assert (pair["labellers"], pair["rows"]) == ("a / b", 0) and np.isnan(pair["kappa"])
    assert label.agreement(pd.DataFrame({"source": ["ALLOW"]})).empty


def test_the_interval_of_agreement_holds_the_truth_nineteen_times_in_twenty():
    dice, held, words = np.random.default_rng(0), [], np.array(list(map(str, Verdict)))
    for _ in range(20):
        truth = dice.integers(4, size=150)
        said = np.where(dice.random((150, 2)) < 0.7, truth[:, None], dice.integers(4, size=(150, 2)))
        pair = label.agreement(pd.DataFrame(words[said], columns=["a", "b"]), 100).iloc[0]
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


def test_a_queue_is_worked_through_in_papermill(folder):
    rows = [row(0, "ALLOW"), row(1, prompt=HOSTILE), row(2, prompt="猫に玉ねぎをあげていい？", lang="ja"), row(3)]
    ask(folder, rows, [{"id": rows[1]["id"], "labeller": "agent:a", "verdict": "REFUSE"}])
    fill(folder, **{rows[0]["id"]: "ALLOW", rows[1]["id"]: "REFUSE", rows[2]["id"]: "ESCALATION"})
    work(folder, alias="taro")
    assert label.read_answers(folder / "answers.jsonl") == [
        {"id": rows[i]["id"], "labeller": "person:taro", "verdict": verdict}
        for i, verdict in enumerate(("ALLOW", "REFUSE", "ESCALATION"))]


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
    votes = [{"id": rows[0]["id"], "labeller": "agent:a", "verdict": "DENY"}]
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
    "Stages collect and cleanse over four rows: two contradict each other, one has no verdict. Or over rows of a test."

    def __init__(self, root: Path, asked=ASKED, config: str = ""):
        self.root, self.answers = root, root / "labels" / "answers.jsonl"
        for folder in ("configs", "nbs/stages"):
            (root / folder).mkdir(parents=True)
        shutil.copy(ROOT / "settings.ini", root)
        for name in ("collect", "cleanse"):
            shutil.copy(ROOT / "nbs" / "stages" / f"{name}.ipynb", root / "nbs" / "stages")
        config = config or "data: {sources: [mine.jsonl]}"
        (root / "configs" / "my.yaml").write_text(f"name: my\nstages: [collect, cleanse]\n{config}\n")
        common = {"lang": "en", "area": "everyday", "licence": "MIT"}
        quad = dict.fromkeys(("task", "safety", "policy", "answer"), "hm") | {"final": "hm DENY"}
        rows = [common | {"id": key, "prompt": prompt, "verdict": verdict} | (quad if key == "a" else {})
                for key, prompt, verdict in asked]
        (root / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def so8t(self, *words: str, code: int = 0) -> str:
        command = [sys.executable, "-c", "from so8t.cli import main; main()", *words]
        done = subprocess.run(command, cwd=self.root, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    def executed(self) -> list[str]:
        "The stages that the newest run executed."
        events = map(json.loads, max(self.root.glob("runs/*/events.jsonl")).read_text().splitlines())
        return [event["stage"] for event in events if event["event"] == "stage_started"]

    def queued(self) -> list[str]:
        cells = nbformat.read(self.answers.with_name("queue.ipynb"), as_version=4).cells
        return [cell.id.removeprefix("label-") for cell in cells if cell.id.startswith("label-")]

    @property
    def artifact(self) -> Path:
        return max(self.root.glob("runs/*/artifacts/cleanse/*"), key=lambda path: path.stat().st_mtime)

    def tables(self) -> list[pd.DataFrame]:
        "The tables that the page of the newest run shows."
        newest = max(self.root.glob("runs/*/notebooks/cleanse.ipynb"), key=lambda path: path.stat().st_mtime)
        cells = nbformat.read(newest, as_version=4).cells
        shown = [o["data"].get("text/html", "") for c in cells for o in c.get("outputs", []) if "data" in o]
        return [pd.read_html(io.StringIO(html))[0] for html in shown if "<table" in html]

    def rows(self) -> dict[str, dict]:
        sides = [self.artifact / f"{side}.parquet" for side in ("train", "validation", "test")]
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


QUESTIONS = {
    "agreed": "Which herbs grow on a balcony?", "disputed": "How do I copy a house key?",
    "taken": "Where is the harbour?", "open": "May I keep a wolf at home?",
    "garbled": "Who was the first king of Spain?", "kept": "How long do eggs boil?"}


@pytest.fixture
def labelled(tmp_path, base, monkeypatch) -> Workspace:
    "Rows on which a model and an agent agree, differ, and on which the agent says what is no verdict."
    said = backends.connect(str(base)).logs(list(QUESTIONS.values()))
    model = {key: str(max(each, key=each.get)) for key, each in zip(QUESTIONS, said, strict=True)}
    other = {key: next(str(v) for v in Verdict if v != verdict) for key, verdict in model.items()}
    agent = model | {"open": other["open"], "garbled": "MAYBE", "kept": "Allow!"}
    asked = [(key, text, {"agreed": model["agreed"], "disputed": other["disputed"], "kept": model["kept"]}.get(key))
             for key, text in QUESTIONS.items()]
    monkeypatch.setenv("AGENT_HOME", str(tmp_path))  # a folder in the configuration is an input, and this one changes
    command = json.dumps(["{python}", str(ROOT / "tests" / "agent.py"), "$AGENT_HOME", "bare"])
    workspace = Workspace(tmp_path / "workspace", asked, f"""
data: {{sources: [mine.jsonl], labellers: [{{model: {base}}}, {{agent: helper}}]}}
research:
  {{agents: [{{name: helper, command: {command}, licence: MIT}}], per_minute: 60000, backoff: 0.01, concurrency: 1}}
""")
    (tmp_path / "verdicts.json").write_text(json.dumps({QUESTIONS[key]: verdict for key, verdict in agent.items()}))
    workspace.model, workspace.agent, workspace.asked = model, agent, tmp_path / "asked.jsonl"
    return workspace


def ids(*keys: str) -> set[str]:
    return {row(0, prompt=QUESTIONS[key])["id"] for key in keys}


def test_labellers_vote_and_what_they_settle_is_the_label(labelled, base):
    labelled.so8t("run", "configs/my.yaml")
    rows, model = labelled.rows(), f"model:{base}"
    assert set(rows) == {"agreed", "disputed", "taken", "kept"}
    assert (rows["taken"]["verdict"], rows["taken"]["labeller"]) == (labelled.model["taken"], f"{model}, agent:helper")
    assert rows["disputed"]["verdict"] != labelled.model["disputed"]
    assert rows["kept"]["verdict"] == labelled.model["kept"]
    assert ids("open", "garbled", "disputed") <= set(labelled.queued()) and not ids("taken") & set(labelled.queued())
    queue = labelled.answers.with_name("queue.ipynb").read_text(encoding="utf-8")
    assert "agent:helper" in queue and model in queue
    counts, kappas, strange = labelled.tables()[1:4]
    assert dict(counts.values) == {"votes": 10, "words that are no verdict": 2, "rows in dispute": 2,
                                   "rows that take their label": 1}
    names = ["source", model, "agent:helper"]
    assert dict(kappas[["labellers", "rows"]].values) == {
        " / ".join(names): 2, " / ".join(names[:2]): 3, " / ".join(names[::2]): 2, " / ".join(names[1:]): 4}
    assert kappas[["kappa", "low", "high"]].notna().all(axis=None)
    assert {"Allow!", "MAYBE"} <= set(strange.astype(str).values.ravel())
    votes = pd.read_parquet(labelled.artifact / "votes.parquet")
    counts = votes.groupby("labeller")["verdict"].count().to_dict()
    assert len(votes) == 18 and counts == {model: 6, "agent:helper": 4, "source": 3}

    label.answer(labelled.answers, "taro", *ids("open"), "REFUSE")
    labelled.so8t("run", "configs/my.yaml")
    assert labelled.rows()["open"]["labeller"] == "person:taro" and not ids("open") & set(labelled.queued())
    assert len(disk.read_jsonl(labelled.asked)) == len(QUESTIONS), "no question is put to an agent twice"


def test_labelling_killed_in_the_middle_asks_nothing_again_and_ends_with_the_same_bytes(labelled):
    (labelled.asked.parent / "kill").write_text("4")
    for _ in range(3):
        command = [sys.executable, "-c", "from so8t.cli import main; main()", "run", "configs/my.yaml"]
        done = subprocess.run(command, cwd=labelled.root, capture_output=True, text=True)
        if done.returncode == 0:
            break
    assert done.returncode == 0 and not (labelled.asked.parent / "kill").exists(), done.stdout + done.stderr
    assert len(disk.read_jsonl(labelled.asked)) == len(QUESTIONS) + 1, "the one whose answer was lost is asked again"
    files = {path.name: path.read_bytes() for path in labelled.artifact.glob("[!m]*")}
    assert "votes.parquet" in files and "train.parquet" in files
    labelled.so8t("run", "configs/my.yaml", "--new", "--no-reuse")
    assert {path.name: path.read_bytes() for path in labelled.artifact.glob("[!m]*")} == files
