"Whatever a model writes: what is rendered is read back, reading never fails, and no thought gets out."

import re

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from so8t.data.verdict import Verdict
from so8t.flow.problem import Problem
from so8t.model import judge, quad
from so8t.model.quad import HANDOVER, MARKS, TAGLIKE, TAGS, Fault, Malformed, Quad, parse, public, render, verdict_of

MANY = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
SNIPPETS = ["Use of a knife.", "庭の手入れ、", "誰も傷つかない。", "\n", "\n\n", "\t", "　", "<", " < ", "</", "<b>",
            "a<b", "< 3", ">", "think", "final>", "/think-task>", "ALLOW", "REFUSE", "allow", "🙂", "👩‍👩‍👧", "«»",
            "{prompt}", "\\n", "\u200b", "\x00", "&lt;final&gt;", "＜final＞", "<|end|>", " "]
SECRETS = ("SECRET-ONE", "SECRET-TWO", "SECRET-THREE", "SECRET-FOUR")
OPEN = "For everybody."


def proper(text: str) -> bool:
    "Whether a text can be a part of a quad."
    return bool(text) and not TAGLIKE.search(text)


pieces = st.one_of(st.sampled_from(SNIPPETS), st.text(max_size=6))
parts = st.lists(pieces, min_size=1, max_size=6).map(lambda p: "".join(p).strip()).filter(proper)
quads = st.builds(Quad, parts, parts, parts, parts, st.sampled_from(Verdict), parts)


@MANY
@given(quads)
@example(Quad("<", "a\n\nb", "使う", "So ALLOW", Verdict.REFUSE, "<"))
def test_what_is_rendered_is_read_back(written):
    assert parse(render(written)) == written
    assert parse(f" \n{render(written)}\n") == written
    spaced = re.sub(r"(</[a-z-]+>)", r"\1\n", render(written))
    assert parse(spaced) == written


@MANY
@given(quads, st.data())
def test_every_prefix_is_malformed(written, data):
    text = render(written)
    read = parse(text[: data.draw(st.integers(0, len(text) - 1))])
    assert isinstance(read, Malformed) and read.fault in (Fault.TRUNCATED, Fault.MISSING)


def test_every_single_prefix_of_one_quad_is_malformed():
    text = render(Quad("a <", "害は\nない", "b", "c", Verdict.DENY, "d < e"))
    faults = [parse(text[:n]).fault for n in range(len(text))]
    assert set(faults) == {Fault.TRUNCATED, Fault.MISSING} and isinstance(parse(text), Quad)


def by_pattern(text: str) -> tuple | None:
    "A second reader, after the letter of the grammar: the six texts, or None."
    parts = r"\s*".join(f"<{tag}>(.*?)</{tag}>" for tag in TAGS)
    found = re.fullmatch(rf"\s*{parts}\s*", text, re.DOTALL)
    if not found or any(TAGLIKE.search(part) or not part.strip() for part in found.groups()):
        return None
    *thoughts, last, answer = (part.strip() for part in found.groups())
    ends = re.fullmatch(r"(.*\S.*) (ALLOW|ESCALATION|DENY|REFUSE)", last, re.DOTALL)
    return (*thoughts, ends[1].strip(), ends[2], answer) if ends else None


def holds(read: Quad | Malformed) -> tuple | None:
    "What the reader found, as `by_pattern` says it."
    if isinstance(read, Malformed):
        assert isinstance(read.fault, Fault) and read.tag in TAGS
        return None
    return read.task, read.safety, read.policy, read.final, str(read.verdict), read.answer


def keeps_secrets(text: str):
    "No thought is in what goes out, unless the text itself gives it as the answer."
    read = parse(text)
    given_away = re.findall(r"<final>([^<]*)</final>", text)
    for shown in (public(read), public(read, "ja"), repr(read), str(read), f"{read}", str(verdict_of(read))):
        for secret in SECRETS:
            assert secret not in shown or any(secret in inner for inner in given_away), text
    if isinstance(read, Malformed):
        assert public(read) == HANDOVER["en"] and verdict_of(read) == Verdict.ESCALATION


@MANY
@given(st.text())
@example("")
@example("\ud800")
@example("<final>")
def test_any_text_is_read(text):
    assert holds(parse(text)) == by_pattern(text)


WHOLE = [piece for tag, part in zip(TAGS, (*SECRETS[:3], f"{SECRETS[3]} ALLOW", OPEN), strict=True)
         for piece in (f"<{tag}>", part, f"</{tag}>")]
TORN = ["<Final>", "< final>", "<final", "</think", "<think-polish>"]
debris = st.sampled_from([*MARKS, *SECRETS, OPEN, " ", "ALLOW", *TORN])


@MANY
@given(st.lists(debris, max_size=24))
def test_any_heap_of_tags_and_parts_is_read(heap):
    text = "".join(heap)
    assert holds(parse(text)) == by_pattern(text)
    keeps_secrets(text)


@MANY
@given(st.permutations(range(len(WHOLE))))
def test_shuffled_tags_and_parts(order):
    text = "".join(WHOLE[i] for i in order)
    assert holds(parse(text)) == by_pattern(text)
    keeps_secrets(text)


edits = st.lists(st.tuples(st.sampled_from(["drop", "repeat", "swap", "insert", "cut", "nest"]),
                           st.integers(0, 99), st.integers(0, 99), debris), max_size=4)


def edited(whole: list[str], changes: list[tuple]) -> str:
    "A quad, damaged step by step."
    whole = list(whole)
    for kind, a, b, piece in changes:
        a, b = a % max(1, len(whole)), b % max(1, len(whole))
        if kind == "insert" or not whole:
            whole.insert(a + (b % 2), piece)
        elif kind == "drop":
            del whole[a]
        elif kind == "repeat":
            whole.insert(b, whole[a])
        elif kind == "swap":
            whole[a], whole[b] = whole[b], whole[a]
        elif kind == "cut":
            whole[a] = whole[a][: b % (len(whole[a]) + 1)]
        else:
            whole[a:a] = whole[min(a, b) : max(a, b) + 1]
    return "".join(whole)


@MANY
@given(edits)
def test_a_damaged_quad_keeps_its_thoughts_to_itself(changes):
    text = edited(WHOLE, changes)
    assert holds(parse(text)) == by_pattern(text)
    keeps_secrets(text)


@MANY
@given(st.lists(st.tuples(st.sampled_from(MARKS), st.integers(0, 14)), max_size=6), st.sets(st.sampled_from(MARKS)))
def test_tags_moved_around_parts_that_stay_never_publish_a_thought(added, dropped):
    whole = [piece for piece in WHOLE if piece not in dropped]
    for mark, place in added:
        whole.insert(place % (len(whole) + 1), mark)
    read = parse("".join(whole))
    assert public(read) in (OPEN, HANDOVER["en"])
    assert not any(secret in repr(read) + str(read) + public(read) for secret in SECRETS)


@pytest.mark.parametrize("tag", TAGS)
def test_one_tag_gone_twice_or_inside_another_part_is_no_quad(tag):
    text = "".join(WHOLE)
    for mark in (f"<{tag}>", f"</{tag}>"):
        for damaged in (text.replace(mark, ""), text.replace(mark, mark * 2), text.replace(mark, mark.upper()),
                        *(text.replace(secret, secret[:4] + mark + secret[4:]) for secret in (*SECRETS, OPEN))):
            assert isinstance(parse(damaged), Malformed), damaged
            keeps_secrets(damaged)


@pytest.mark.parametrize("gap", range(len(TAGS) + 1))
def test_text_and_tags_between_the_parts_are_no_part_of_a_quad(gap):
    before, after = "".join(WHOLE[: 3 * gap]), "".join(WHOLE[3 * gap :])
    tag = TAGS[min(gap, len(TAGS) - 1)]
    assert parse(f"{before} Well. {after}") == Malformed(Fault.OUTSIDE, tag)
    assert isinstance(parse(f"{before} \n　{after}"), Quad)
    for again in TAGS[:gap]:
        assert parse(f"{before}<{again}>x</{again}>{after}") == Malformed(Fault.REPEATED, again)


@pytest.mark.parametrize("word", [
    "allow", "Allow", "aLLOW", "ALLOWED", "ALLOW.", "ALLOW!", "ALLOW。", "DISALLOW", "NOT_ALLOW", "\"ALLOW\"", "ALLOW,",
    "ＡＬＬＯＷ", "許可", "Deny", "REFUSED", "ESCALATE", "escalation", "ALLOW\u200b", "ALLOW\x00", "ALLOW|DENY",
    "\u0410LLOW"])
def test_what_only_looks_like_a_verdict_is_none(word):
    read = parse("".join(WHOLE).replace("ALLOW", word))
    assert read == Malformed(Fault.VERDICT, "think-final")
    assert verdict_of(read) == Verdict.ESCALATION


@MANY
@given(st.text(min_size=1, max_size=8).map(str.strip), st.sampled_from(Verdict), st.booleans())
def test_a_verdict_with_anything_grown_onto_it_is_none(growth, verdict, before):
    assume(growth and not re.search(r"[<\s]", growth))
    word = growth + verdict if before else verdict + growth
    assume(word not in list(Verdict))
    assert parse("".join(WHOLE).replace("ALLOW", word)) == Malformed(Fault.VERDICT, "think-final")


def test_a_verdict_needs_a_thought_and_a_space_before_it():
    whole = "".join(WHOLE)
    for last in ("ALLOW", "So.ALLOW", "So.\nALLOW", "So.　ALLOW", "ALLOW, I think", "ALLOW."):
        assert parse(whole.replace(f"{SECRETS[3]} ALLOW", last)) == Malformed(Fault.VERDICT, "think-final"), last


@given(st.sampled_from(["task", "safety", "policy", "final", "answer"]), parts,
       st.sampled_from(["", " x", "x\n", "<final>", "< / THINK", "<think-task"]))
def test_no_quad_is_made_that_could_not_be_read_back(field, part, wrong):
    texts = dict.fromkeys(("task", "safety", "policy", "final", "answer"), part) | {field: wrong}
    with pytest.raises(Problem, match=f"quad: {field}") as caught:
        Quad(**texts, verdict=Verdict.ALLOW)
    assert str(caught.value) == f"quad: {field} must be text without a tag and without space around it"


PHI3 = """{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}{{'<|system|>
' + message['content'] + '<|end|>
'}}{% elif message['role'] == 'user' %}{{'<|user|>
' + message['content'] + '<|end|>
'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>
' + message['content'] + '<|end|>
'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>
' }}{% else %}{{ eos_token }}{% endif %}"""
CHATML = """{% for message in messages %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
TEMPLATES = {"phi3": (PHI3, "<|user|>\n", "<|end|>\n<|assistant|>\n"),
             "chatml": (CHATML, "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")}


def chat(template: str, marks: list[str]) -> PreTrainedTokenizerFast:
    "A tokenizer of bytes with a chat template whose marks are one token each."
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=marks[0], additional_special_tokens=marks[1:])
    found.chat_template = template
    return found


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("instruction", [quad.INSTRUCTION, judge.INSTRUCTION])
@settings(deadline=None, max_examples=50)
@given(text=st.text(max_size=20))
@example(text="包丁の研ぎ方は？\n急いでいます。")
@example(text="Say {prompt} <final>x</final> {{ messages }} {% endif %}")
def test_the_question_keeps_the_marks_of_the_chat_template(name, instruction, text):
    template, before, after = TEMPLATES[name]
    marks = sorted(set(re.findall(r"<\|\w+\|>", before + after)))
    tokenizer = chat(template, marks)
    asked = judge.question(tokenizer, text, instruction)
    assert asked == before + instruction.replace("{prompt}", text) + after
    assume(not re.search(r"[\ud800-\udfff]", text))
    ids = judge.encode(tokenizer, asked)
    assert [ids.count(tokenizer.convert_tokens_to_ids(mark)) for mark in marks] == [
        (before + after).count(mark) for mark in marks]
