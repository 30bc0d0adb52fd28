"Our own four-way set keeps what it promises: enough of everything, and nothing twice."

from collections import Counter, defaultdict

import pytest

from so8t.data.duplicates import jaccard, shingles
from so8t.data.row import normal
from so8t.data.sources import read_own
from so8t.data.verdict import Verdict

ROWS = read_own()
LANGUAGES = ("en", "ja")


def rows_of(lang):
    return [row for row in ROWS if row["lang"] == lang]


def pairs():
    found = defaultdict(list)
    for row in ROWS:
        if row["pair"]:
            found[row["pair"]].append(row)
    return found


@pytest.mark.parametrize("lang", LANGUAGES)
def test_there_are_at_least_400_rows_in_each_language(lang):
    assert len(rows_of(lang)) >= 400


@pytest.mark.parametrize("lang", LANGUAGES)
def test_twelve_harm_areas_and_everyday_life_are_covered(lang):
    areas = Counter(row["area"] for row in rows_of(lang))
    assert areas["everyday"] >= 40
    assert len([area for area, count in areas.items() if area != "everyday" and count >= 10]) >= 12


@pytest.mark.parametrize("lang", LANGUAGES)
def test_no_verdict_is_rare(lang):
    verdicts = Counter(row["verdict"] for row in rows_of(lang))
    assert set(verdicts) == set(Verdict)
    assert min(verdicts.values()) >= 0.15 * len(rows_of(lang))


def test_every_row_has_a_reason_and_an_id_that_says_where_it_belongs():
    assert [row["key"] for row in ROWS if not row["reason"]] == []
    assert [row["key"] for row in ROWS if not row["key"].startswith(f"{row['lang']}-{row['area']}-")] == []


def test_ids_are_unique_across_languages():
    assert [id for id, count in Counter(row["key"] for row in ROWS).items() if count > 1] == []


def test_no_prompt_is_there_twice():
    assert [text for text, count in Counter(normal(row["prompt"]) for row in ROWS).items() if count > 1] == []


def test_a_hundred_pairs_look_alike_and_differ_in_verdict():
    differing = [two for two in pairs().values() if len({row["verdict"] for row in two}) > 1]
    assert len(differing) >= 100


def test_a_pair_is_two_rows_of_one_language():
    assert [pair for pair, two in pairs().items() if len(two) != 2 or len({row["lang"] for row in two}) > 1] == []


SHINGLES = [shingles(normal(row["prompt"]), row["lang"]) for row in ROWS]


def test_pairs_are_more_alike_than_chance():
    place = {row["id"]: i for i, row in enumerate(ROWS)}
    twins = [jaccard(*(SHINGLES[place[row["id"]]] for row in two)) for two in pairs().values()]
    strangers = [jaccard(a, b) for a, b in zip(SHINGLES, SHINGLES[7:], strict=False)]
    assert sum(twins) / len(twins) > 3 * sum(strangers) / len(strangers)


def test_rows_of_different_groups_are_not_near_duplicates():
    known = list(zip(ROWS, SHINGLES, strict=True))
    close = [
        (a["key"], b["key"])
        for i, (a, x) in enumerate(known)
        for b, y in known[:i]
        if a["lang"] == b["lang"] and a["group"] != b["group"] and jaccard(x, y) >= 0.7
    ]
    assert close == []
