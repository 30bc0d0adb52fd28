import io
import json
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from transformers import AutoTokenizer, Phi3Config, Phi3ForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
WORDS = {"ALLOW": "boil an egg", "ESCALATION": "stop my tablets", "DENY": "copy a film", "REFUSE": "poison a well"}


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    "A Phi-3 with random weights, small enough to train in milliseconds."
    folder, model = tmp_path_factory.mktemp("base"), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*WORDS.values(), *WORDS] * 20), model_writer=model, vocab_size=340, model_type="bpe",
        byte_fallback=True, pad_id=-1, hard_vocab_limit=False, minloglevel=2, num_threads=1)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    names = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}\n{{ m.content }}\n{% endfor %}assistant\n"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    Phi3ForCausalLM(Phi3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=1, eos_token_id=2, pad_token_id=2, sliding_window=None)).save_pretrained(folder)
    return folder
