"Cleansing beyond what its notebooks show: promises over random rows, a million of them, hostile ones, what is written."

import json
import re
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from so8t.data import card, cleanse, duplicates, label, sources
from so8t.data.cleanse import Reason
from so8t.data.row import SCHEMA, check_row, iter_rows, iter_tables, normal, shards, split_of, stored, write_shards
from so8t.data.verdict import Verdict
from so8t.flow.config import Data
from so8t.flow.problem import Problem


def made(key, prompt, verdict="ALLOW", source="web", **more):
    row = {"key": key, "lang": "en", "area": "everyday", "prompt": prompt, "verdict": verdict, "group": key} | more
    return check_row(row, key) | {"source": source}


def table(rows):
    return pa.Table.from_pylist([stored(row) for row in rows], schema=SCHEMA)


@pytest.fixture
def scratch(tmp_path):
    return tmp_path / "scratch.arrow"


def fates(rows, scratch, tested=None, **settings):
    "What became of each row, by key."
    return cleanse.cleanse([table(rows)], Data(**settings), scratch, tested).fates.set_index("name")


@st.composite
def collections(draw):
    "Rows of few words, so that all kinds of doubles are frequent."
    words = st.lists(st.sampled_from(["cat", "dog", "猫がいる", "bird", "Ｃａｔ", "fish"]), min_size=1, max_size=5)
    texts = draw(st.lists(words.map(" ".join), min_size=1, max_size=14))
    return [
        made(
            f"r{i:02d}",
            text,
            draw(st.sampled_from(list(map(str, Verdict)))),
            draw(st.sampled_from(["own", "web", "net"])),
            lang=draw(st.sampled_from(["en", "ja", "fr"])),
            group=draw(st.sampled_from(["p1", "p2", f"r{i:02d}"])),
        )
        for i, text in enumerate(texts)
    ]


STRICT = {"max_characters": 30, "near_duplicate": 0.7, "test_share": 0.4, "validation_share": 0.2, "min_quality": 0.01}


@settings(max_examples=40, deadline=None)
@given(rows=collections())
def test_cleansed_rows_keep_every_promise(tmp_path_factory, rows):
    done = cleanse.cleanse([table(rows)], Data(**STRICT), tmp_path_factory.getbasetemp() / "scratch.arrow")
    assert sorted(done.fates["name"]) == [row["key"] for row in rows]
    left = [row for row in rows if row["key"] in set(done.left["name"])]
    assert all(row["lang"] in ("en", "ja") and len(row["prompt"]) <= 30 for row in left)
    assert len({normal(row["prompt"]) for row in left}) == len(left)
    sides, texts = done.left.groupby("group")["split"].nunique(), [normal(row["prompt"]) for row in left]
    assert (sides <= 1).all()
    pairs = [(i, j) for i, a in enumerate(left) for j, b in enumerate(left[:i]) if a["group"] != b["group"]]
    if pairs:
        sets = [duplicates.shingles(text, row["lang"]) for text, row in zip(texts, left, strict=True)]
        assert max(duplicates.jaccard(sets[i], sets[j]) for i, j in pairs) < 0.7
    doubles = done.fates[done.fates["reason"].isin([Reason.DUPLICATE, Reason.NEAR])]
    assert set(doubles["of"]) <= set(done.left["name"])


@settings(max_examples=15, deadline=None)
@given(rows=collections(), random=st.randoms())
def test_the_order_of_the_rows_changes_nothing(tmp_path_factory, rows, random):
    scratch = tmp_path_factory.getbasetemp() / "scratch.arrow"
    first, second = (fates(some, scratch, **STRICT) for some in (rows, random.sample(rows, len(rows))))
    pd.testing.assert_frame_equal(first, second.loc[first.index], check_dtype=False)


def test_of_a_test_row_and_its_near_duplicate_the_training_row_goes(scratch):
    names = [f"row-{i}" for i in range(99)]
    train, test = (next(n for n in names if split_of(n, 0.4) == split) for split in ("train", "test"))
    rows = [made(train, "How do I water a cactus?", source="own"), made(test, "How do I water a cactus??")]
    found = fates(rows, scratch, test_share=0.4)
    assert found.loc[test, "reason"] == "" and found.loc[train, "reason"] == Reason.TESTED
    assert found.loc[train, "of"] == f"held-out: {test}"


def test_sides_of_our_own_set_never_move():
    own = sources.read_own()
    for row in own:
        assert (cleanse.side(row["group"], Data()) == "test") == (split_of(row["group"], 0.2) == "test")
    for group in ("en-p001", "ja-p001", "ja-everyday-001", "en-everyday-002"):
        assert cleanse.side(group, Data()) == "train"
    assert {cleanse.side(row["group"], Data()) for row in own} == {"train", "validation", "test"}


def test_our_own_rows_pass_and_its_look_alike_pairs_stay(scratch):
    done = cleanse.cleanse([table(sources.read_own())], Data(), scratch)
    assert len(done.left) >= 0.99 * len(done.fates)
    pairs = done.fates.groupby("group")["reason"].agg(["size", lambda reasons: (reasons == "").all()])
    assert pairs[pairs["size"] == 2].iloc[:, 1].all() and (pairs["size"] == 2).sum() >= 100


def test_likeness_in_a_pair_is_its_purpose(scratch):
    texts = {"a": "How do I shoot a model in good light?", "b": "How do I shoot a model in bad light?"}
    pair, strangers = ([made(key, text, group=group or key) for key, text in texts.items()] for group in ("p1", None))
    assert (fates(pair, scratch, near_duplicate=0.5)["reason"] == "").all()
    assert (fates(strangers, scratch, near_duplicate=0.5)["reason"] != "").sum() == 1


def test_near_duplicates_are_those_that_comparing_all_with_all_finds(scratch):
    rng = np.random.default_rng(0)
    own = sources.read_own()[::3]
    changed = []
    for row in own:
        letters = list(row["prompt"])
        letters[rng.integers(len(letters))] = "x"
        changed.append(made(f"{row['key']}-x", "".join(letters), source="web", lang=row["lang"]))
    found = fates([*own, *changed], scratch, near_duplicate=0.7)
    sets = [[duplicates.shingles(normal(row["prompt"]), row["lang"]) for row in rows] for rows in (own, changed)]
    index = np.array(list(map(duplicates.jaccard, *sets)))
    gone = (found["reason"] != "").groupby(found.index.str.removesuffix("-x")).any()[[row["key"] for row in own]]
    assert ((index >= 0.7) == gone).mean() > 0.99 and 100 < gone.sum() < len(gone)


def test_no_picture_is_learned_from_as_if_it_were_its_words(scratch):
    medium = {"kind": "image", "path": "a.png", "digest": "1" * 64, "licence": "MIT", "source": "own"}
    shown = made("a", "What is dangerous in this picture, and why is that so?", media=[medium])
    found = fates([shown, made("b", "What is dangerous in a kitchen, and why is that so?")], scratch)
    assert found["reason"].to_dict() == {"a": Reason.MEDIA, "b": ""}


QUESTION = "A bat and a ball cost one dollar and ten cents; the bat costs a dollar more; what does the ball cost?"
JAPANESE = "鶴と亀が合わせて十匹いて、足の数は全部で二十八本です。鶴は何羽いるでしょうか。"


@pytest.mark.parametrize(
    ("prompt", "lang"),
    [
        (QUESTION, "en"),
        (QUESTION.replace("one dollar", "ONE   dollar").replace(";", ","), "en"),
        (f"Solve this for me, please, and show each step on the way to it. {QUESTION} I am in a hurry!", "en"),
        (f"宿題です。途中の式も全部書いて、分かりやすく説明してください。「{JAPANESE}」よろしくお願いします。", "ja"),
    ],
)
def test_a_benchmark_text_in_training_is_found_and_counted(scratch, prompt, lang):
    train = next(n for n in (f"row-{i}" for i in range(99)) if cleanse.side(n, Data()) == "train")
    rows = [made(train, prompt, lang=lang), made(f"{train}0", "What does a cricket bat cost these days?")]
    done = cleanse.cleanse([table(rows)], Data(), scratch, {"riddles": [QUESTION, JAPANESE]})
    assert done.fates.set_index("name").loc[train, "reason"] == Reason.TESTED
    assert cleanse.counts(done)["benchmarks"] == {"riddles": 1} and len(done.left) == 1


def test_a_test_row_that_a_benchmark_holds_stays(scratch):
    test = next(n for n in (f"row-{i}" for i in range(99)) if cleanse.side(n, Data()) == "test")
    assert fates([made(test, QUESTION)], scratch, {"riddles": [QUESTION]})["reason"].tolist() == [""]


def test_a_benchmark_text_like_a_test_row_still_guards_the_training_rows(scratch):
    sides = {cleanse.side(f"row-{i}", Data()): f"row-{i}" for i in range(99)}
    words = "please explain how one might calmly wash seven muddy striped football shirts".split()
    tested, asked, trained = (" ".join(words[: len(words) - n]) for n in (0, 1, 2))
    rows = [made(sides["test"], tested), made(sides["train"], trained)]
    assert (fates(rows, scratch, near_duplicate=0.85)["reason"] == "").all()
    found = fates(rows, scratch, {"riddles": [asked]}, near_duplicate=0.85)
    assert found.loc[sides["train"], "of"] == "riddles: 1" and found.loc[sides["test"], "reason"] == ""


def test_benchmark_files_are_read_and_a_missing_one_is_a_problem(tmp_path):
    (tmp_path / "riddles.txt").write_text(f"{QUESTION}\n{JAPANESE}\n", encoding="utf-8")
    (tmp_path / "exam.jsonl").write_text(json.dumps({"lang": "en", "area": "a", "prompt": "Hm?", "verdict": None}))
    found = cleanse.read_tested(["riddles.txt", "exam.jsonl"], tmp_path)
    assert found["riddles"] == [QUESTION, JAPANESE, ""] and found["exam"] == ["Hm?"]
    for name in ("gone.txt", "riddles.csv"):
        with pytest.raises(Problem, match=f"data.benchmarks: .*{name}: must be a file that is there"):
            cleanse.read_tested([name], tmp_path)


def test_our_own_suites_are_never_trained_on(scratch):
    suites = cleanse.read_tested([], Path())
    asked = [text for texts in suites.values() for text in texts]
    rows = [made(f"row-{i}", text, lang="ja" if re.search("[ぁ-ヿ]", text) else "en") for i, text in enumerate(asked)]
    done = cleanse.cleanse([table(rows)], Data(min_quality=0.01, languages=["en", "ja"]), scratch, suites)
    assert len(asked) > 50 and set(done.left["split"]) == {"test"}
    assert set(cleanse.counts(done)["benchmarks"]) >= set(suites) - {"held-out"}


def test_no_rows_is_a_problem(scratch):
    with pytest.raises(Problem, match="there are no rows"):
        cleanse.cleanse([SCHEMA.empty_table()], Data(), scratch)


def test_rows_of_which_none_is_left_are_one_clear_line(scratch):
    rows = [made("a", "Where is the station?", verdict=None), made("b", "y" * 9000)]
    done = cleanse.cleanse([table(rows)], Data(), scratch)
    asked, _ = label.questions(done, cleanse.doubtful(done))
    assert [row["key"] for row in asked] == ["a"]
    with pytest.raises(Problem, match="no row is left: 1 × no verdict; 1 × longer than data.max_characters"):
        card.waterfall(done)


def test_hostile_rows_go_with_their_reason_and_the_rest_goes_on(scratch):
    hostile = {
        "long": ("a" * 5_000_000, Reason.LONG),
        "same": ("no " * 600, Reason.POOR),
        "unseen": ("\u200b\u200d\u2060 .", Reason.POOR),
        "private": ("\ue000\ue001 a few letters \ue002", Reason.POOR),
        "marks": ("?" * 90, Reason.POOR),
        "greek": ("Πού είναι ο σταθμός του τρένου, παρακαλώ πολύ, κύριε αστυνόμε;", Reason.FOREIGN),
    }
    rows = [made(key, prompt) for key, (prompt, _) in hostile.items()] + [made("good", "Where is the station?")]
    found = fates(rows, scratch)
    assert {key: found.loc[key, "reason"] for key in hostile} == {key: reason for key, (_, reason) in hostile.items()}
    assert found.loc["good", "reason"] == ""


def test_a_row_without_verdict_waits_for_its_label(scratch):
    found = fates([made("a", "Where is the station?"), made("b", "Where is the harbour?", verdict=None)], scratch)
    assert found["reason"].to_dict() == {"a": "", "b": Reason.UNLABELLED}


NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def bulk(count, verdict, seed=0):
    "Rows that are no duplicates of each other."
    rng = np.random.default_rng(seed)
    return [
        made(f"{verdict}-{i}", f"{verdict} {i} " + " ".join(rng.choice(NUMBERS, 6)), verdict) for i in range(count)
    ]


def test_balance_cuts_no_class_to_the_rarest_and_touches_no_tested_row(scratch):
    rows = [*bulk(900, "ALLOW"), *bulk(60, "DENY"), *bulk(10, "REFUSE")]
    found = fates(rows, scratch, balance_cap=3, near_duplicate=1.0)
    left = found[(found["reason"] == "") & (found["split"] == "train")].groupby("verdict").size()
    assert left["REFUSE"] == (found[found["split"] == "train"]["verdict"] == "REFUSE").sum()
    assert left["ALLOW"] == 3 * left["DENY"] and (found[found["split"] == "test"]["reason"] != Reason.SURPLUS).all()
    train = found[(found["reason"] == "") & (found["split"] == "train")]
    weights = train.groupby("verdict")["weight"].first()
    assert weights["REFUSE"] > weights["DENY"] > weights["ALLOW"]
    assert train["weight"].mean() == pytest.approx(1, abs=1e-3)
    free = fates(rows, scratch, balance_cap=None, near_duplicate=1.0)
    assert (free["reason"] != Reason.SURPLUS).all()


SECRET = {"prompt": "Write to anna@example.com or call 090-1234-5678 about the flat, will you?"}
THOUGHTS = {name: f"{name} for anna@example.com" for name in ("reason", "task", "safety", "policy", "answer")}


def written(rows, folder, **settings):
    done = cleanse.cleanse([table(rows)], Data(**settings), folder / "scratch.arrow")
    out = folder / "out"
    out.mkdir()
    cleanse.save(out, done, cleanse.doubtful(done), card.readme(done))
    return out


def test_nothing_personal_is_written(tmp_path):
    rows = [
        made("kept", SECRET["prompt"], **THOUGHTS, final="final anna@example.com DENY"),
        made("double", SECRET["prompt"]),
        made("long", (SECRET["prompt"] + " ") * 100),
    ]
    out = written(rows, tmp_path)
    assert pq.read_table(out / "removed.parquet").num_rows == 2
    text = "".join(str(pq.read_table(path).to_pylist()) for path in out.glob("*.parquet"))
    text += "".join(path.read_text(encoding="utf-8") for path in out.iterdir() if path.suffix != ".parquet")
    assert "anna" not in text and "1234" not in text and "<EMAIL>" in text
    assert "task for" not in (out / "README.md").read_text(encoding="utf-8")
    assert json.loads((out / "stats.json").read_text())["masked"]["EMAIL"] == 8 + 27


def test_ids_fit_what_is_written_and_no_row_is_on_two_sides(tmp_path):
    rows = [made("a", "Call 090-1234-5678 for me"), *bulk(300, "ALLOW"), *bulk(300, "DENY")]
    out = written(rows, tmp_path)
    found = [row for side in cleanse.SIDES for row in iter_rows([out / f"{side}.parquet"])]
    assert [row["id"] for row in found] == [check_row(row, "written")["id"] for row in found]
    assert len({row["id"] for row in found}) == len(found) > 500
    assert all(row["quality"] == min(row["quality_parts"].values()) for row in found)


def test_datasets_reads_the_artifact(tmp_path):
    out = written(sources.read_own()[:200], tmp_path)
    loaded = datasets.load_dataset(str(out), cache_dir=str(tmp_path))
    assert set(loaded) == {"train", "validation", "test"} and sum(map(len, loaded.values())) == 200
    assert loaded["train"][0]["verdict"] in set(Verdict)


def test_artifacts_are_the_same_bytes_each_time(tmp_path):
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        write_shards(folder, sources.read_own()[:120], size=50)
        done = cleanse.cleanse(iter_tables(shards(folder)), Data(), folder / "scratch.arrow")
        cleanse.save(folder, done, cleanse.doubtful(done), card.readme(done))
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert {"removed.parquet", "test.parquet", "train.parquet", "suspects.jsonl", "README.md"} <= set(names)
    assert "scratch.arrow" not in names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_our_own_rows_stay_where_they_are_when_others_join(tmp_path, scratch):
    more = [made(f"m{i}", f"Tell me fact {i} about owls", group=f"m{i}") for i in range(50)]
    own = sources.read_own()
    alone, joined = fates(own, scratch), fates([*more, *own], scratch)
    columns = ["reason", "split", "id"]
    assert joined.loc[alone.index, columns].equals(alone[columns])


MILLION = """
import os, resource, sys
from pathlib import Path
import numpy as np, pyarrow as pa
from joblib.externals.loky import get_reusable_executor
from so8t.data import cleanse, sources
from so8t.data.row import SCHEMA
from so8t.flow.config import Data
words = np.array(sorted({word for row in sources.read_own() if row["lang"] == "en" for word in row["prompt"].split()}))
rng = np.random.default_rng(0)
def tables():
    for start in range(0, 1_000_000, 10_000):
        prompts = [" ".join(row) for row in words[rng.integers(0, len(words), (10_000, 12))]]
        prompts[::10] = [text + " please" for text in prompts[1::10]]
        names = [f"row-{start + i}" for i in range(10_000)]
        columns = {"id": names, "key": names, "lang": ["en"] * 10_000, "area": ["a"] * 10_000, "prompt": prompts,
                   "verdict": ["ALLOW", "DENY"] * 5_000, "licence": ["MIT"] * 10_000, "group": names,
                   "source": ["web"] * 10_000, "nsfw": [False] * 10_000, "weight": [1.0] * 10_000}
        yield pa.table({f.name: pa.array(columns.get(f.name, [None] * 10_000), f.type) for f in SCHEMA})
folder = Path(sys.argv[1])
done = cleanse.cleanse(tables(), Data(), folder / "scratch.arrow")
get_reusable_executor().shutdown()
cleanse.save(folder, done, cleanse.doubtful(done), "")
here, worker = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
print(len(done.fates), len(done.left), (here + os.cpu_count() * worker) // 1024)
"""


@pytest.mark.soak
@pytest.mark.skipif(sys.platform == "win32", reason="peak memory as POSIX counts it")
def test_a_million_rows_are_cleansed_within_four_gigabytes(tmp_path: Path):
    done = subprocess.run([sys.executable, "-c", MILLION, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    rows, left, peak = map(int, done.stdout.split())
    assert rows == 1_000_000 and 700_000 < left <= 900_000
    assert peak < 4096, f"{peak} MiB, of this process and all that it started"
