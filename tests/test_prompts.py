"Our own four-way set keeps what it promises: enough of everything, and nothing twice."

from collections import Counter, defaultdict

import numpy as np
import pytest

from so8t.data.duplicates import similarity
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


def likeness(pairs):
    "The Jaccard index of each pair of places in ROWS."
    texts, langs = [normal(row["prompt"]) for row in ROWS], [row["lang"] for row in ROWS]
    return similarity(texts, langs, *np.array(pairs).T)


def test_pairs_are_more_alike_than_chance():
    place = {row["id"]: i for i, row in enumerate(ROWS)}
    twins = likeness([[place[row["id"]] for row in two] for two in pairs().values()])
    assert twins.mean() > 3 * likeness([[i, i + 7] for i in range(len(ROWS) - 7)]).mean()


@pytest.mark.parametrize("lang", LANGUAGES)
def test_rows_of_different_groups_are_not_near_duplicates(lang):
    mine = [i for i, row in enumerate(ROWS) if row["lang"] == lang]
    others = [[i, j] for i in mine for j in mine if i < j and ROWS[i]["group"] != ROWS[j]["group"]]
    close = [others[n] for n in np.flatnonzero(likeness(others) >= 0.7)]
    assert [(ROWS[i]["key"], ROWS[j]["key"]) for i, j in close] == []
