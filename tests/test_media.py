"Pictures and sounds that mean no good, and the set of our own."

import hashlib
import io
import random
import socket
import struct
import subprocess
import sys
import zlib
from collections import Counter
from functools import partial

import numpy as np
import pytest
import soundfile
import torch
from fontTools.ttLib import TTFont
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.linear_model import LogisticRegression
from transformers import AutoTokenizer

from so8t.data import media
from so8t.data.verdict import Verdict
from so8t.flow import disk
from so8t.flow.config import Gate, Lora, Media, Ppo, Senses
from so8t.model import adapter, burnin, senses
from so8t.model.judge import verdict_logprobs
from so8t.train import ppo, units
from so8t.train import senses as sensing
from so8t.train.checkpoint import Checkpointer

LIMITS = Media(max_bytes=2_000_000, max_pixels=1_000_000, max_seconds=5)
SCENE = media.render("Please fold a paper crane.", "ALLOW", "sign", random.Random(0))
HUM = 0.5 * np.sin(np.arange(16_000) * 2 * np.pi * 440 / 16_000)


def saved(picture, form, **options):
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, data, *more):
    head = chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def sound(samples, rate=16_000, form="WAV", subtype=None):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=form, subtype=subtype)
    return file.getvalue()


KINDS = {"PNG": "RGB L P 1 RGBA I;16", "JPEG": "RGB L CMYK", "WEBP": "RGB RGBA", "GIF": "RGB L P", "BMP": "RGB L P 1"}


@pytest.mark.parametrize("form, mode", [(form, mode) for form, modes in KINDS.items() for mode in modes.split()])
def test_pictures_of_all_kinds_become_rgb(form, mode):
    picture = SCENE.convert("L").convert(mode) if mode == "I;16" else SCENE.convert(mode)
    found = media.pixels(saved(picture, form), LIMITS)
    assert (found.shape, found.dtype) == ((224, 224, 3), np.uint8)


def test_a_camera_was_held_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = SCENE.crop((0, 0, 200, 100))
    assert media.pixels(saved(wide, "JPEG", exif=exif), LIMITS).shape == (200, 100, 3)


@pytest.mark.parametrize("data, why", [
    (png(10**5, 10**5, b""), "too many pixels"),
    (png(2**31 - 1, 2**31 - 1, b""), "too many pixels"),
    (png(1001, 1000, zlib.compress(bytes(10))), "too many pixels"),
    (png(0, 0, b""), "broken"),
    (png(9, 9, zlib.compress(bytes(10**8), 9)), None),
    (png(9, 9, b"", chunk(b"zTXt", b"jam\0\0" + zlib.compress(bytes(10**8)))), "broken"),
    (saved(SCENE, "TIFF"), "broken"), (saved(SCENE, "EPS"), "broken"), (saved(SCENE, "PDF"), "broken"),
    (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "broken"), (b"", "broken"), (b"\x89PNG\r\n\x1a\n", "broken"),
    (saved(SCENE, "PNG")[:-2000], "broken"), (saved(SCENE, "JPEG")[:1500], "broken")])
def test_bombs_and_broken_pictures(data, why):
    if why:
        with pytest.raises(media.Unfit, match=why):
            media.pixels(data, LIMITS)
    else:
        assert media.pixels(data, LIMITS).shape == (9, 9, 3)


@pytest.mark.parametrize("form, subtype", [
    ("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "ULAW"), ("FLAC", None), ("OGG", "VORBIS"), ("MP3", None)])
@pytest.mark.parametrize("rate", [8000, 44_100, 48_000])
def test_sounds_of_all_kinds_become_mono_at_16_khz(form, subtype, rate):
    times = np.arange(rate) / rate
    stereo = np.stack([0.5 * np.sin(2 * np.pi * 440 * times)] * 2, 1)
    found = media.samples(sound(stereo, rate, form, subtype), LIMITS)
    assert found.dtype == np.float32 and found.ndim == 1 and abs(len(found) - 16_000) < 1600
    assert abs(np.abs(np.fft.rfft(found[:16_000])).argmax() * 16_000 / min(len(found), 16_000) - 440) < 8


def lying(data, field, value):
    "A WAV file whose head says something else."
    return data[:field] + struct.pack("<I", value) + data[field + 4:]


@pytest.mark.parametrize("data, why", [
    (sound(np.zeros(16_000 * 6)), "too long"), (sound(np.zeros(16_000 * 6), form="FLAC"), "too long"),
    (sound(np.zeros((1600, 9))), "odd kind"), (sound(HUM, 1), "odd kind"), (sound(HUM, 2_000_000), "odd kind"),
    (sound(np.full(1600, np.nan), subtype="FLOAT"), "no sound"),
    (sound(np.full(1600, np.inf), subtype="FLOAT"), "no sound"), (sound(np.zeros(0)), "no sound"),
    (b"", "broken"), (b"RIFF\xff\xff\xff\xffWAVEfmt ", "broken"), (b"ID3" + bytes(99), "broken"),
    (saved(SCENE, "PNG"), "broken"), (lying(sound(HUM), 24, 0), "broken|odd kind")])
def test_broken_and_endless_sounds(data, why):
    with pytest.raises(media.Unfit, match=why):
        media.samples(data, LIMITS)


def test_a_head_that_promises_more_than_there_is():
    assert len(media.samples(lying(lying(sound(HUM), 40, 2**32 - 9), 4, 2**32 - 1), LIMITS)) == 16_000


@pytest.mark.parametrize("read, whole", [
    *((media.pixels, saved(SCENE, form)) for form in media.FORMATS),
    *((media.samples, sound(HUM, form=form)) for form in ("WAV", "FLAC", "OGG", "MP3"))])
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_damage_is_told_or_harmless(read, whole, data):
    torn = bytearray(whole[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else whole)
    for _ in range(data.draw(st.integers(0, 20)) if torn else 0):
        torn[data.draw(st.integers(0, min(len(torn), 4000) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = read(bytes(torn), LIMITS)
    except media.Unfit:
        return
    if read is media.pixels:
        assert found.dtype == np.uint8 and found.shape[2] == 3 and found.shape[0] * found.shape[1] <= LIMITS.max_pixels
    else:
        assert np.isfinite(found).all() and np.abs(found).max() <= 1 and len(found) <= 5.01 * media.RATE


def test_only_what_was_collected_is_opened(tmp_path, monkeypatch):
    def none(*args, **kwargs):
        raise AssertionError("nothing is fetched")

    monkeypatch.setattr(socket, "socket", none)
    monkeypatch.setattr(socket, "getaddrinfo", none)
    folder = tmp_path / "artifact"
    medium = media.keep(folder, saved(SCENE, "PNG"), "own.png", kind="image", licence="MIT", source="own")
    secret = tmp_path / "secret.png"
    secret.write_bytes(saved(SCENE, "PNG"))
    (folder / "media" / "link.png").symlink_to(secret)
    assert media.decode(medium, folder, LIMITS).shape == (224, 224, 3)
    for path in ("../secret.png", str(secret), "media/link.png"):
        with pytest.raises(media.Unfit, match="leads elsewhere"):
            media.decode(medium | {"path": path}, folder, LIMITS)
    for path in ("https://example.org/jam.png", "media", "file:///etc/passwd", "data:image/png;base64,AAAA"):
        with pytest.raises(media.Unfit, match="no such file"):
            media.decode(medium | {"path": path}, folder, LIMITS)
    with pytest.raises(media.Unfit, match="file too large"):
        media.decode(medium, folder, Media(max_bytes=100))
    (folder / medium["path"]).write_bytes(saved(SCENE, "JPEG"))
    with pytest.raises(media.Unfit, match="not the file that was collected"):
        media.decode(medium, folder, LIMITS)


def test_a_row_with_a_broken_medium_is_put_aside_and_the_rest_goes_on(tmp_path):
    rows = list(media.demo_images(8, 0, tmp_path))
    (tmp_path / rows[2]["media"][0]["path"]).write_bytes(b"")
    (tmp_path / rows[5]["media"][0]["path"]).unlink()
    why = [reason and reason.split(": ")[1] for _, reason in media.screen(rows, tmp_path, LIMITS)]
    assert why == [None, None, "not the file that was collected", None, None, "no such file", None, None]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    return folder, list(media.demo_images(320, 3, folder))


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sounds")
    return folder, list(media.demo_sounds(40, 3, folder))


@pytest.mark.parametrize("made", ["pictures", "sounds"])
def test_only_the_medium_decides(made, request):
    folder, rows = request.getfixturevalue(made)
    assert len({row["id"] for row in rows}) == len(rows)
    for start in range(0, len(rows), 4):
        four = rows[start : start + 4]
        assert [row["verdict"] for row in four] == list(Verdict)
        assert len({(row["prompt"], row["pair"], row["group"], row["split"], row["area"]) for row in four}) == 1
        assert len({row["media"][0]["digest"] for row in four}) == 4
    by_question = Counter((row["prompt"], row["verdict"]) for row in rows)
    assert all(len({by_question[prompt, verdict] for verdict in Verdict}) == 1 for prompt, _ in by_question)
    for row in rows:
        [medium] = row["media"]
        assert hashlib.sha256((folder / medium["path"]).read_bytes()).hexdigest() == medium["digest"]
        assert medium["licence"] in ("Apache-2.0", "CC-BY-3.0") and medium["source"].startswith("own: ")


@pytest.mark.parametrize("made", ["pictures", "sounds"])
def test_held_out_rows_have_unseen_wording(made, request):
    _, rows = request.getfixturevalue(made)
    parts = {name: [row for row in rows if row["split"] == name] for name in ("train", "validation", "test")}
    assert all(len(part) >= len(rows) // 5 for part in parts.values())
    for field in ("prompt", "group", "pair"):
        seen = [{row[field] for row in part} for part in parts.values()]
        assert sum(map(len, seen)) == len(set.union(*seen))
    assert {row["lang"] for row in rows} == {"en", "ja"}
    for lang in ("en", "ja"):
        for part in ("frames", "image", "speech", "signal"):
            assert len(set(media.words()[lang][part])) == len(media.SPLITS)


def test_every_letter_has_a_shape():
    known = TTFont(media.font(10).path).getBestCmap()
    said = {c for lang in media.words().values() for part in lang.values() for text in part for c in text}
    assert [c for c in said if ord(c) not in known] == []


CHILD = """
import sys
from so8t.data import media
make = {"image": media.demo_images, "sound": media.demo_sounds}[sys.argv[1]]
print([row["id"] for row in make(8, 5, sys.argv[2])])
"""


@pytest.mark.parametrize("kind", ["image", "sound"])
def test_the_same_seed_gives_the_same_rows_in_another_process(kind, tmp_path):
    make = {"image": media.demo_images, "sound": media.demo_sounds}[kind]
    command = [sys.executable, "-c", CHILD, kind, str(tmp_path)]
    there = subprocess.run(command, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == str([row["id"] for row in make(8, 5, tmp_path)])


def test_what_the_medium_says_can_be_learnt(pictures):
    "A linear model hears signals in their spectrum and sees signs in their colours; new wording does not hide them."
    dice, verdicts = random.Random(0), list(Verdict) * 20
    heard = [np.abs(np.fft.rfft(media.signal(v, dice), 16_000))[:4000] for v in verdicts]
    heard = np.log1p(np.reshape(heard, (len(heard), 40, -1)).max(2))
    assert LogisticRegression(max_iter=500).fit(heard[:40], verdicts[:40]).score(heard[40:], verdicts[40:]) > 0.9
    folder, rows = pictures
    signs = [row for row in rows if row["area"] == "image-sign"]
    seen = [media.decode(row["media"][0], folder, LIMITS)[:130:8, ::8].ravel() / 255 for row in signs]
    right, train = np.array([row["verdict"] for row in signs]), np.array([row["split"] == "train" for row in signs])
    model = LogisticRegression(max_iter=500).fit(np.array(seen)[train], right[train])
    assert model.score(np.array(seen)[~train], right[~train]) > 0.9


@pytest.mark.soak
def test_the_whole_set_of_sounds(tmp_path):
    rows = list(media.demo_sounds(200, 0, tmp_path))
    assert len({row["id"] for row in rows}) == 200
    assert {why for _, why in media.screen(rows, tmp_path, Media())} == {None}


MIXED = Ppo(iterations=2, rollouts=4, chunk=2, minibatch=2, micro_batch=1, epochs=1, max_new_tokens=12,
            learning_rate=1e-3)
TEXTS = [{"lang": "en", "prompt": f"Say <{mark}> {i}", "verdict": "ALLOW", "answer": "So."}
         for i, mark in enumerate(("image", "audio", "image", "audio"))]


@pytest.fixture(scope="module", params=["image", "audio"])
def perceiving(request, base, tmp_path_factory):
    "A folder with a small model that sees or hears, an adapter of its own, and rows with and without a medium."
    folder, torch_threads = tmp_path_factory.mktemp("perceiving"), torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    small = Senses(kind=request.param, hidden=16, layers=1, heads=2, pixels=24, patch=12, mels=16, seconds=1)
    senses.save(*senses.BUILDERS[request.param](base, small), folder / "base")
    wrapped = sensing.to_judge(adapter.load_base(folder / "base"), Lora(rank=2), Gate(), 0)
    with torch.no_grad():
        for p in adapter.trained(wrapped).values():
            p.add_(0.05 * torch.randn_like(p))
    adapter.save(wrapped, folder / "adapter")
    make = {"image": media.demo_images, "audio": media.demo_sounds}[request.param]
    yield folder, list(make(4, 0, folder)) + TEXTS
    torch.set_num_threads(torch_threads)


def mixed(perceiving) -> ppo.Ppo:
    folder, rows = perceiving
    look = partial(senses.features_of, folder=folder, limits=Media())
    return ppo.Ppo(ppo.Policy(folder / "base", folder / "adapter", MIXED, "cpu", look=look), rows, 0)


def ends(perceiving, place, stops=()):
    "What PPO on mixed rows ends with, taken up again after each stop."
    for stop in (*stops, None):
        work = mixed(perceiving)
        work.total = stop or work.total
        units.run(work, Checkpointer(place, {"base": "tiny"}), place / "ppo.jsonl")
    final = place / f"{work.total:08d}-final"
    return (final / "tensors.safetensors").read_bytes(), disk.read_jsonl(place / "ppo.jsonl")


def test_ppo_on_mixed_rows_goes_on_to_the_bit(perceiving, tmp_path):
    whole, told = ends(perceiving, tmp_path / "whole")
    again, retold = ends(perceiving, tmp_path / "again", stops=(1, 2, 3, 5))
    assert [row["phase"] for row in told].count("rollout") == 4 and retold == told
    assert again == whole


def test_a_row_with_a_medium_is_judged_by_it_and_a_text_is_not(perceiving):
    work, (_, rows) = mixed(perceiving), perceiving
    rolled, _ = ppo.sample(work.policy, [rows[0], rows[4], rows[1]])
    assert rolled["medium"].tolist() == [True, False, True]
    mark = adapter.mark_of(work.model)
    assert (rolled["question"] == mark).any(1).tolist() == [True, False, True]
    assert not (rolled["answer"] == mark).any()
    looks = ("pixel_values", "input_features")
    blank = {name: torch.zeros_like(t) if name in looks else t for name, t in rolled.items()}
    with torch.no_grad():
        moved = (work.policy.judged(rolled)[0] - work.policy.judged(blank)[0]).abs().max(1).values
        alone = [work.policy.judged({name: t[i : i + 1] for name, t in rolled.items()})[0] for i in range(3)]
    assert moved[0] > 1e-3 and moved[1] == 0 and moved[2] > 1e-3
    assert torch.allclose(torch.cat(alone), rolled["logs"], atol=0.05)


def test_the_text_part_of_a_burned_in_model_is_that_model_on_text(perceiving, base, tmp_path):
    folder, rows = perceiving
    prompts = ["Boil an egg", *(row["prompt"] for row in rows if row["prompt"].isascii())]
    burnin.merge(folder / "base", folder / "adapter", tmp_path / "senses", prompts)
    said = burnin.text_part(tmp_path / "senses", base, tmp_path / "text", prompts)
    text, whole = adapter.load_base(tmp_path / "text"), adapter.load_base(tmp_path / "senses")
    assert type(text).__name__ == said["class"] == "Phi3ForCausalLM"
    ids, size = torch.randint(3, 300, (2, 9)), adapter.load_base(base).config.vocab_size
    assert text(ids).logits.shape[-1] == size
    assert torch.equal(text(ids).logits, whole(ids).logits[..., :size])
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert torch.equal(*(verdict_logprobs(model, tokenizer, prompts) for model in (text, whole)))
    assert not torch.allclose(text(ids).logits, adapter.load_base(base)(ids).logits, atol=1e-3)
