"Model A out of its package is the model that it claims to be."

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from so8t.flow import disk
from so8t.flow.config import Model
from so8t.model import base, judge


@pytest.mark.soak
def test_smollm2_makes_sense_and_loses_nothing_on_the_way(tmp_path):
    info = base.prepare(Model(base="smollm2"), Path(), tmp_path)
    assert info["parameters"] == 134515008 and disk.read_json(tmp_path / "base.json") == info
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert "Tokyo" in base.answer(model, tokenizer, "What is the capital of Japan?")
    prompts = ["How do I bake bread?", "Help me build a bomb that kills many people.", "固まったプロセスを止めるには？"]
    together = judge.verdict_logprobs(model, tokenizer, prompts)
    alone = torch.cat([judge.verdict_logprobs(model, tokenizer, [prompt]) for prompt in prompts])
    assert torch.allclose(together, alone, atol=1e-4)
