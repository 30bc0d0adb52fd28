"What the notebooks of `eval` cannot show: a benchmark killed with the power, and scores that must not exist."

import json
import random
import subprocess
import sys
import time

import pytest

from so8t.data.verdict import Verdict
from so8t.eval import verdicts
from so8t.flow import disk
from so8t.flow.problem import Problem

ROWS = [{"id": f"x-{i:03}", "lang": "en", "area": "home", "pair": None, "group": f"x-{i:03}",
         "prompt": "word " * (1 + i % 7), "verdict": list(Verdict)[i % 4]} for i in range(40)]

# answers depend on the company that a prompt is asked in, as a padded batch's last bits do
JUDGE = """
import json, sys, time
from pathlib import Path
from so8t.data.verdict import Verdict
from so8t.eval import verdicts

def load():
    def judge(prompts):
        time.sleep(float(sys.argv[3]))
        company = sum(map(len, prompts))
        return [{v: -1.0 - i * (len(p) + company) / 1000 for i, v in enumerate(Verdict)} for p in prompts]
    return judge

rows = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
verdicts.judge_rows("A", load, rows, Path(sys.argv[2]), batch=3)
"""


def judge(folder, out, pause=0.0):
    (folder / "rows.json").write_text(json.dumps(ROWS), encoding="utf-8")
    return subprocess.Popen([sys.executable, "-c", JUDGE, str(folder / "rows.json"), str(out), str(pause)])


def test_a_killed_benchmark_ends_with_the_same_bytes(tmp_path):
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    assert judge(tmp_path, whole).wait() == 0
    draw, kept = random.Random(0), []
    for _ in range(3):
        before = killed.stat().st_size if killed.exists() else 0
        runner = judge(tmp_path, killed, pause=0.1)
        while runner.poll() is None and (not killed.exists() or killed.stat().st_size == before):
            time.sleep(0.005)
        time.sleep(draw.random() * 0.05)
        runner.kill()
        runner.wait()
        kept.append(killed.stat().st_size)
    assert 0 < kept[0] < kept[1] < kept[2]
    with killed.open("r+b") as file:
        file.truncate(kept[-1] - 20)
    assert judge(tmp_path, killed).wait() == 0
    assert killed.read_bytes() == whole.read_bytes()


def test_a_score_needs_every_row():
    answers = [verdicts.answer("A", row, dict.fromkeys(Verdict, -2.0) | {row["verdict"]: -0.1}) for row in ROWS]
    others = [{**answer, "model": "B"} for answer in answers[:-1]]
    with pytest.raises(Problem, match="x-039 was not judged by both models"):
        verdicts.scores(answers + others, ["B-A"], resamples=100)


@pytest.mark.parametrize("logs", [{}, dict.fromkeys(Verdict, float("nan")), {Verdict.ALLOW: -1.0}])
def test_no_placeholder_becomes_an_answer(logs):
    with pytest.raises(Problem, match="gave no probability"):
        verdicts.answer("A", ROWS[0], logs)


def test_equal_models_are_not_told_apart():
    answers = [verdicts.answer("A", row, dict.fromkeys(Verdict, -2.0) | {row["verdict"]: -0.1}) for row in ROWS]
    found = verdicts.compare(answers, [{**answer, "model": "B"} for answer in answers], resamples=100)
    assert found["accuracy"]["value"] == 0 < found["accuracy"]["high"] and found["mcnemar"]["p"] == 1
    assert verdicts.sentence(found).startswith("The evidence does not decide")


def test_scores_are_plain_json(tmp_path):
    answers = [verdicts.answer(model, row, dict.fromkeys(Verdict, -2.0) | {Verdict.DENY: -0.1})
               for model in "AB" for row in ROWS]
    result = verdicts.scores(answers, ["B-A"], resamples=100)
    disk.write_json(tmp_path / "scores.json", result)
    assert disk.read_json(tmp_path / "scores.json") == result
    assert "NaN" not in (tmp_path / "scores.json").read_text(encoding="utf-8")
