"What the notebooks of `eval` cannot show: servers asked over HTTP, a kill, a whole comparison, exit codes."

import json
import math
import subprocess
import sys
from pathlib import Path
from threading import Thread

import pytest
import uvicorn
from garden import Garden, wait_for, write_notebook
from typer.testing import CliRunner

from so8t.cli import app
from so8t.data.verdict import Verdict
from so8t.eval import backends, suites, verdicts
from so8t.eval.backends import Ollama, Reply, Sampling, ask_all, connect, model_digest
from so8t.flow import disk
from so8t.flow.config import Benchmark
from so8t.flow.problem import Problem
from so8t.model import quad
from so8t.serve.ollama import ollama_app
from so8t.ship.gguf import convert

ITEMS = [{"id": f"i{n}", "prompt": f"boil an egg {n}"} for n in range(8)]


@pytest.fixture(scope="module")
def gguf(base, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    convert(base, path, "f16", "tiny")
    return path


@pytest.fixture
def server(gguf, monkeypatch):
    "so8t's own Ollama-compatible routes on a port of this machine."
    running = uvicorn.Server(uvicorn.Config(ollama_app({"tiny": gguf}), port=0, log_level="error"))
    thread = Thread(target=running.run, daemon=True)
    thread.start()
    wait_for(lambda: running.started)
    port = running.servers[0].sockets[0].getsockname()[1]
    monkeypatch.setenv("OLLAMA_HOST", f"http://127.0.0.1:{port}")
    yield running
    running.should_exit = True
    thread.join()


def test_ollamas_client_is_answered_by_our_routes_as_llama_cpp_answers(server, gguf):
    there, here, how = connect("ollama:tiny"), connect(str(gguf)), Sampling(max_tokens=6)
    assert isinstance(there, Ollama)
    (one,), (other,) = (backend.say(["boil an egg"], how) for backend in (there, here))
    assert (one.text, one.tokens) == (other.text, other.tokens)
    assert 0 < one.first <= one.seconds
    assert model_digest("ollama:tiny") == backends.sha256(gguf)
    with pytest.raises(Problem, match="is the server running, and the model registered"):
        connect("ollama:nobody")


def test_a_model_without_probabilities_is_judged_by_its_word_and_not_calibrated(server, tmp_path):
    rows = [
        {
            "id": f"x{n}",
            "lang": "en",
            "area": "home",
            "pair": None,
            "group": f"x{n}",
            "prompt": "boil an egg",
            "verdict": list(Verdict)[n % 4],
        }
        for n in range(4)
    ]
    answers = verdicts.judge_models({"A": "ollama:tiny"}, rows, tmp_path, 2, load=lambda name, _: connect(name).logs)
    assert [a["predicted"] for a in answers] == ["ESCALATION"] * 4
    assert all(math.isclose(sum(a["probabilities"].values()), 1) for a in answers)
    assert verdicts.calibrations(answers, 0.5, 0.9) == [{"model": "A", "not run": "it gives no probabilities"}]


KILLED = """
import json, sys, time
from pathlib import Path
from so8t.eval.backends import Hf, ask_all, Sampling
say = Hf.say
Hf.say = lambda *words: (time.sleep(0.3), say(*words))[1]
items = json.loads(sys.argv[3])
ask_all("A", lambda: Hf(sys.argv[1]), items, Path(sys.argv[2]), Sampling(max_tokens=6), batch=2)
"""


def test_a_killed_comparison_asks_nothing_twice_and_ends_with_the_same_answers(base, tmp_path):
    how, whole, killed = Sampling(max_tokens=6), tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    expected = ask_all("A", lambda: connect(str(base)), ITEMS, whole, how, batch=2)
    runner = subprocess.Popen([sys.executable, "-c", KILLED, str(base), str(killed), json.dumps(ITEMS)])
    wait_for(lambda: killed.exists() and killed.stat().st_size)
    runner.kill()
    runner.wait()
    before = disk.read_jsonl(killed)
    assert 0 < len(before) < len(ITEMS)
    found = ask_all("A", lambda: connect(str(base)), ITEMS, killed, how, batch=2)
    assert [row["text"] for row in found] == [row["text"] for row in expected]
    assert found[: len(before)] == before and len(disk.read_jsonl(killed)) == len(ITEMS)
    assert ask_all("A", None, ITEMS, killed, how, batch=2) == found


def test_shards_ask_each_item_once(base, tmp_path):
    parts = [
        ask_all("A", lambda: connect(str(base)), ITEMS, tmp_path / f"{n}.jsonl", Sampling(2), shard=(n, 3))
        for n in range(3)
    ]
    assert sorted(row["id"] for part in parts for row in part) == [item["id"] for item in ITEMS]
    assert [len(part) for part in parts] == [3, 3, 2]


def test_no_thought_is_kept(tmp_path):
    class Thinker:
        "Says what a trained model says."

        batch, limits = 1, []
        said = quad.render(quad.Quad("a secret", "secret", "secret", "secret", Verdict.DENY, "I would rather not."))
        told = {"i0": said, "i1": said[:-9], "i2": f"<think>secret</think>{said}"}

        def say(self, prompts, how):
            return [Reply(self.told[prompt], 9, 0.1, None) for prompt in prompts]

    items = [{"id": f"i{n}", "prompt": f"i{n}"} for n in range(3)]
    found = ask_all("A", Thinker, items, tmp_path / "A.jsonl")
    assert "secret" not in (tmp_path / "A.jsonl").read_text(encoding="utf-8")
    assert [(row["text"], row["verdict"]) for row in found] == [("I would rather not.", "DENY"), ("", None), ("", None)]


def test_every_answer_of_the_default_suite_is_unlike_its_rivals():
    items = suites.own("mathematics", "logic", "safety", "japanese")
    assert len({item["id"] for item in items}) == len(items) == 109
    for item in items:
        for rival in item.get("others", []):
            assert suites.score(item, backends.kept(rival)) == 0, item["id"]
        if item["check"] == "number":
            assert suites.score(item, backends.kept(f"{float(item['answer']) + 1:g}")) == 0, item["id"]
    for suite in ("mathematics", "logic", "safety", "japanese"):
        assert sum(item["suite"] == suite for item in items) >= 25


@pytest.mark.parametrize("name", ["smol", "model", ""])
def test_a_name_that_is_no_model_is_refused(name):
    with pytest.raises(ValueError, match="is no model"):
        Benchmark(models={"A": name})


BENCHMARK = """import random
from so8t.data.verdict import Verdict
from so8t.flow import disk
how = stage.config.custom.seed
dice, words = random.Random(how["dice"]), list(Verdict)
rows = [{"model": "C", "id": str(i), "group": str(i), "lang": "en", "pair": None, "verdict": words[i % 4],
         "predicted": words[i % 4] if dice.random() < how["right"] else "ESCALATION"} for i in range(how["items"])]
with stage.publish() as folder:
    disk.append_jsonl(folder / "rows.jsonl", *rows)"""


def test_a_pipeline_can_refuse_a_model_that_is_worse(tmp_path, monkeypatch):
    garden = Garden(tmp_path)
    write_notebook(garden.root, "benchmark", [], ["custom.seed"], BENCHMARK)
    garden.config.write_text(garden.config.read_text().replace("stages: [seed, grow, pick]", "stages: [benchmark]"))
    runs = {}
    for name, (right, dice, items) in {"old": (0.8, 1, 120), "bad": (0.5, 3, 120), "short": (0.9, 1, 60)}.items():
        said = garden.so8t("run", "--new", "--set", f"custom.seed={{right: {right}, dice: {dice}, items: {items}}}")
        assert said.returncode == 0, said.stderr
        runs[name] = max(garden.runs.glob("garden-*")).name
    monkeypatch.chdir(garden.root)

    def compare(a, b, *words):
        return CliRunner().invoke(app, ["compare", runs.get(a, a), runs.get(b, b), *words])

    fine, worse = compare("bad", "old"), compare("old", "bad", "--json")
    assert (fine.exit_code, worse.exit_code) == (0, 1)
    assert fine.stdout.startswith("no worse: accuracy:") and json.loads(worse.stdout)["high"] < 0
    assert compare("old", "old").exit_code == 0 and compare("old", "bad", "--metric", "macro_f1").exit_code == 1
    for words in (
        ["old", "short"],
        ["old", "gone"],
        ["old", "bad", "--metric", "spelling"],
        ["old", f"{runs['bad']}:B"],
    ):
        assert compare(*words).exception.code == 2, words


AB = """name: ab
stages: [ready, collect, cleanse, benchmark, suites, report]
benchmark: {{models: {{A: {a}, B: {b}}}, comparisons: [B-A], items: 24, bootstrap: 200, suite_items: 2,
  answer_tokens: 6, suites: [default, reasoning, grammar, standard, speed, judged], judge: {{model: {b}}}}}
data: {{sources: [own], rows_per_source: 120}}
resources: {{device: cpu, threads: 1, free_disk: 1 MB}}
"""


@pytest.mark.soak
def test_two_named_models_are_compared_by_real_notebooks(base, gguf, tmp_path):
    root = Path(__file__).parents[1]
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "ab.yaml").write_text(AB.format(a=base, b=gguf), encoding="utf-8")
    (tmp_path / "settings.ini").write_text(
        f"[so8t]\nruns = runs\nconfigs = configs\nstages = {root / 'nbs' / 'stages'}\nconfig = configs/ab.yaml\n"
        "order = ready collect cleanse benchmark suites report\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-c", "from so8t.cli import main; main()", "run", "ab", "--anyway"]
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    (folder,) = tmp_path.glob("runs/*/artifacts/suites/*")
    scores, rows = disk.read_json(folder / "scores.json"), disk.read_jsonl(folder / "rows.jsonl")
    wanted = {"mathematics", "logic", "safety", "japanese", "reasoning", "grammar", "so8t_verdicts"}
    assert wanted <= scores["suites"].keys()
    assert set(scores["not_run"]) >= {"elyza", "mmlu", "standard, model B"}
    assert all(row["score"] is None or 0 <= row["score"] <= 1 for row in rows)
    (page,) = tmp_path.glob("runs/*/notebooks/report.html")
    assert "not decided" in page.read_text(encoding="utf-8")
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "nothing has changed" in again.stdout
