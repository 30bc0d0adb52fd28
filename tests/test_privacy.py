"Masking of personal data: promises over any text, and floors on the labelled set."

import json
import re
import time
from importlib import resources

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from phonenumbers import PhoneMetadata, country_code_for_region, example_number
from stdnum import iban, luhn
from stdnum.jp import in_

from so8t.data.privacy import RULES, Span, find, mask, mask_row, narrow
from so8t.flow.problem import Problem

MARKED = re.compile(r"\[\[([A-Z]+)\|(.*?)\]\]", re.DOTALL)
LINES = (resources.files("so8t") / "assets" / "privacy.jsonl").read_text(encoding="utf-8").splitlines()
LABELLED = [json.loads(line) for line in LINES]
SECRETS = {  # value: the words that announce it
    "jane@example.com": "{}", "090-1234-5678": "{}", "4111 1111 1111 1111": "{}", "DE89 3704 0044 0532 0130 00": "{}",
    "192.0.2.44": "{}", "2001:db8::1": "{}", "AKIAIOSFODNN7EXAMPLE": "{}", "1234 5678 9018": "マイナンバー {}",
    "山田花子": "私の名前は{}です", "100-0001": "〒{}", "Tr0ub4dor&3": "password: {}", "TK1234567": "passport {}",
    "Jane Roe": "my name is {}", "012345678900": "免許証 {}", "212-555-0142": "+1 {}",
}
said = [words.format(value) for value, words in SECRETS.items()]
texts = st.lists(st.one_of(st.sampled_from(said), st.text(max_size=20), st.sampled_from("0123456789-. @:")), max_size=8)


@settings(max_examples=200, deadline=None)
@given(texts.map(" ".join), st.sampled_from(["en", "ja", "fr"]))
def test_masking_any_text_keeps_its_promises(text, lang):
    spans = find(text, lang)
    assert all(0 <= a.start < a.end <= len(text) for a in spans)
    assert all(a.end <= b.start for a, b in zip(spans, spans[1:], strict=False))
    masked, counts = mask(text, lang)
    assert counts.total() == len(spans)
    for span in spans:
        assert text[span.start : span.end] not in repr(span)
    rest, at = [], 0
    for span in spans:
        rest += [text[at : span.start], f"<{span.kind}>"]
        at = span.end
    assert masked == "".join([*rest, text[at:]])


@pytest.mark.parametrize("value", SECRETS)
@pytest.mark.parametrize("around", ["{}", "前{}。後", "a, {}.", "（{}）", "\n{}\n", "「{}」", "A {} b"])
def test_a_secret_is_masked_whatever_stands_around_it(value, around):
    masked, counts = mask(around.format(SECRETS[value].format(value)), "ja")
    assert counts.total() == 1 and not any(part in masked for part in value.split())


def test_masked_text_is_left_alone():
    for row in LABELLED:
        masked, _ = mask(MARKED.sub(r"\2", row["text"]), row["lang"])
        assert mask(masked, row["lang"])[0] == masked, row["id"]


@pytest.mark.parametrize("lang, least", [("en", 0.85), ("ja", 0.85)])
def test_most_of_the_labelled_texts_come_out_exactly_as_marked(lang, least):
    rows = [row for row in LABELLED if row["lang"] == lang]
    right = [mask(MARKED.sub(r"\2", row["text"]), lang)[0] == MARKED.sub(r"<\1>", row["text"]) for row in rows]
    assert sum(right) / len(rows) > least


def test_traps_stay_as_they_are():
    traps = [row for row in LABELLED if "[[" not in row["text"]]
    caught = [row["id"] for row in traps if find(row["text"], row["lang"])]
    assert len(traps) > 80 and len(caught) <= 4, caught


def test_the_set_holds_synthetic_values_only():
    for row in LABELLED:
        for kind, value in MARKED.findall(row["text"]):
            if kind == "EMAIL" and "@" in value:
                assert re.search(r"@([\w.]*example|例え)\.", narrow(value).lower()), row["id"]
            if kind == "IP" and re.fullmatch(r"[\d.]+", value) and "." in value:
                assert value.startswith(("192.0.2.", "198.51.100.", "203.0.113.")), row["id"]
            if kind == "IP" and ":" in value:
                assert value.lower().startswith(("2001:db8", "2001:0db8", "fe80:")), row["id"]


@pytest.mark.parametrize("region", ["JP", "US", "GB", "DE", "FR", "IN", "AU", "BR", "KR", "CN"])
def test_an_international_number_of_any_country_is_found(region):
    number = example_number(region)
    assert PhoneMetadata.metadata_for_region(region) and number.country_code == country_code_for_region(region)
    text = f"+{number.country_code} {number.national_number}"
    assert mask(f"連絡は {text} へ", "ja")[1]["PHONE"] == mask(f"Call {text} now", "en")[1]["PHONE"] == 1


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**11 - 1), st.integers(0, 9))
def test_twelve_digits_are_a_my_number_only_with_their_check_digit(body, check):
    number = f"{body:011}{check}"
    kinds = [span.kind for span in find(f"これは{number}です", "ja")]
    assert ("MYNUMBER" in kinds) == in_.is_valid(number)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["4111", "5500", "2223", "3530", "6011"]), st.integers(0, 10**12 - 1))
def test_sixteen_digits_of_a_network_are_a_card_only_if_luhn_says_so(network, body):
    number = f"{network}{body:012}"
    kinds = [span.kind for span in find(f"pay with {number} now", "en")]
    assert ("CARD" in kinds) == luhn.is_valid(number)


@pytest.mark.parametrize("number", ["DE89370400440532013000", "GB82WEST12345698765432"])
def test_one_wrong_digit_makes_an_iban_none(number):
    for i in range(4, len(number)):
        if number[i].isdigit():
            wrong = number[:i] + str((int(number[i]) + 1) % 10) + number[i + 1 :]
            assert not iban.is_valid(wrong) and not [s for s in find(wrong, "en") if s.kind == "IBAN"]


def test_errors_and_reprs_show_nothing():
    with pytest.raises(Problem) as error:
        find({"card": "4111111111111111"}, "en")
    assert "4111" not in str(error.value)
    assert repr(find("4111111111111111", "en")) == "[Span(kind='CARD', start=0, end=16, score=1.0)]"
    assert set(Span.__dataclass_fields__) == {"kind", "start", "end", "score"}


PIECES = ("a.", "1 ", "@", "山", "ア", "A1", "key=", "0:", "my name is A", "-----BEGIN ", "eyJ", "x@y.", "A ",
          "ア・", "090-")


@pytest.mark.parametrize("piece", PIECES)
def test_the_work_on_a_long_hostile_text_does_not_grow_by_the_square(piece):
    def seconds(times):
        start = time.process_time()
        find(piece * times, "en")
        return max(time.process_time() - start, 0.05)

    assert seconds(20_000) / seconds(2_500) < 20, "8 times the text, 64 times the work"


def test_all_texts_of_a_row_are_masked_and_nothing_else():
    row = {"id": "a", "lang": "ja", "source": "a@example.com", "prompt": "a@example.com", "answer": "b@example.com"}
    masked, counts = mask_row(row)
    assert masked == row | {"prompt": "<EMAIL>", "answer": "<EMAIL>"} and counts == {"EMAIL": 2}
    assert len({rule.kind for rule in RULES}) == 10
