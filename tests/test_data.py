"Data that a notebook cannot show: bad files line by line, invariants over random rows."

import json

import pytest

from so8t.data import sources
from so8t.data.row import read_rows, split_of
from so8t.data.verdict import Verdict
from so8t.flow.config import Data
from so8t.flow.problem import Problem

GOOD = {"id": "a", "lang": "en", "area": "everyday", "prompt": "Will it rain?", "verdict": "ALLOW"}


def to_jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def missing(field):
    return {key: value for key, value in GOOD.items() if key != field}


BAD = {
    "no verdict": (missing("verdict"), "has no verdict"),
    "unknown verdict": (GOOD | {"verdict": "BLOCK"}, "'BLOCK' is no verdict; it must be one of ALLOW, ESCALATION"),
    "verdict in lower case": (GOOD | {"verdict": "allow"}, "'allow' is no verdict"),
    "verdict with a space": (GOOD | {"verdict": "ALLOW "}, "'ALLOW ' is no verdict"),
    "no prompt": (missing("prompt"), "has no prompt"),
    "empty prompt": (GOOD | {"prompt": " 　\n"}, "prompt is empty"),
    "prompt of another type": (GOOD | {"prompt": ["hi"]}, "prompt must be text, not list"),
    "quality that is no number": (GOOD | {"quality": float("nan")}, "quality input should be a finite number"),
    "bytes that nobody could read": (GOOD | {"prompt": "caf\ufffd"}, "prompt holds .ufffd"),
    "a language in words": (GOOD | {"lang": "English"}, "lang string should match"),
    "half a character": (GOOD | {"prompt": "a\ud800b"}, "prompt holds half a character"),
    "unknown field": (GOOD | {"label": 1}, "'label' is no field of a row"),
    "a list": ([1], "a row is a JSON object"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, name):
    row, expected = BAD[name]
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join([json.dumps(GOOD), "", json.dumps(row)]), encoding="utf-8")
    with pytest.raises(Problem, match=f"mine.jsonl line 3: .*{expected}"):
        read_rows(file)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b'{"id": "a"', "line 1: is not JSON"),
        (b'{"id": "\x83\x8f"}', "line 1: is not UTF-8 text"),
        (b"NaN", "line 1: a row is a JSON object"),
    ],
)
def test_what_is_no_json_text_is_named_by_file_and_line(tmp_path, raw, expected):
    (tmp_path / "mine.jsonl").write_bytes(raw)
    with pytest.raises(Problem, match=expected):
        read_rows(tmp_path / "mine.jsonl")


def test_a_missing_file_and_a_folder_are_problems(tmp_path):
    for path in (tmp_path / "gone.jsonl", tmp_path):
        with pytest.raises(Problem, match="cannot be read"):
            read_rows(path)


def test_windows_line_ends_and_byte_order_mark_are_read(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n")
    assert read_rows(file)[0]["key"] == "a"


def test_a_prompt_may_hold_any_line_separator(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text(to_jsonl([GOOD | {"prompt": "one\u2028two\x85three\nfour"}]), encoding="utf-8")
    assert read_rows(file)[0]["prompt"] == "one\u2028two\x85three\nfour"


@pytest.mark.parametrize("strange", [None, 3, "", "Allow", "DENY.", "ALLOW DENY"])
def test_a_verdict_is_one_of_four_words_or_an_error(strange):
    with pytest.raises(Problem, match="is no verdict; it must be one of ALLOW, ESCALATION, DENY, REFUSE"):
        Verdict.parse(strange)


def test_severity_orders_verdicts_against_words_too():
    words = ["ALLOW", "ESCALATION", "DENY", "REFUSE"]
    for i, low in enumerate(words):
        for j, high in enumerate(words):
            assert (Verdict(low) < high) == (i < j) and (Verdict(low) >= high) == (i >= j)
            assert (Verdict(low) > high) == (i > j) and (Verdict(low) <= high) == (i <= j)


def test_the_split_of_our_own_set_never_moves():
    for group in ("en-p001", "ja-p001", "ja-everyday-001", "en-everyday-002"):
        assert split_of(group, 0.2) == "train"
    for group in ("ja-p003", "en-everyday-001", "en-medical-011"):
        assert split_of(group, 0.2) == "test"


def test_our_own_rows_stay_where_they_are_when_others_join(tmp_path):
    more = [GOOD | {"id": f"m{i}", "licence": "MIT", "prompt": f"Tell me fact {i} about owls"} for i in range(50)]
    (tmp_path / "mine.jsonl").write_text(to_jsonl(more), encoding="utf-8")
    place = sources.Place(tmp_path, tmp_path / "work", tmp_path / "web")
    alone, joined = Data(), Data(sources=["mine.jsonl", "own"])
    assert sources.collect(joined, place)[0]["rows"] == 50
    alone, joined = (list(sources.kept_rows(data, place)) for data in (alone, joined))
    assert alone == [row for row in joined if row["source"] == "own"]
