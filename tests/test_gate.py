"Gates in every family's layout: nothing changes at first, something is learned, and the burned-in model says the same."

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from so8t.flow.config import Gate, Lora
from so8t.flow.problem import Problem
from so8t.model import adapter, burnin, gate

torch.set_num_threads(1)
SHAPE = dict(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
FAMILIES = {
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SHAPE)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True)),
    "qwen": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE)),
    "gemma": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=16)),
}
LAYERS = {"phi3": 4, "llama": 7, "qwen": 7, "mistral": 7, "gemma": 7}
KINDS = {"gates": (Lora(rank=0), Gate()), "both": (Lora(rank=4), Gate())}
IDS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path) -> str:
    torch.manual_seed(0)
    FAMILIES[request.param]().save_pretrained(tmp_path / "base")
    return request.param


def stirred(model, size: float = 0.2):
    "Numbers into everything that learns, as training would put them there."
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad or name.endswith("bias"):
                p.add_(size * torch.randn_like(p))
    return model.eval()


def said(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


@pytest.mark.parametrize("how", ["none", "nf4"])
@pytest.mark.parametrize("kind", KINDS)
def test_bit_equal_at_first_and_the_same_when_burned_in(family, kind, how, tmp_path):
    base = adapter.load_base(tmp_path / "base", quantization=how).eval()
    before, expected = said(base), type(base)
    model = adapter.wrap(base, *KINDS[kind]).eval()
    assert torch.equal(said(model), before)
    assert len(gate.gates_of(model)) == SHAPE["num_hidden_layers"]
    wanted = said(stirred(model))
    assert (wanted - before).abs().max() > 1e-2
    merged = burnin.burn_in(model)
    assert type(merged) is expected
    assert (said(merged) - wanted).abs().max() <= 1e-4


def test_lora_reaches_every_linear_layer_of_the_family(family, tmp_path):
    base = adapter.load_base(tmp_path / "base")
    gate.attach(base, Gate())
    assert len(adapter.linears_of(base)) == LAYERS[family]


def test_the_wrong_side_is_caught(family, tmp_path, monkeypatch):
    model = stirred(adapter.wrap(adapter.load_base(tmp_path / "base"), Lora(rank=4), Gate()))
    wanted = said(model)
    right = burnin.fold

    def wrong(weight, r):
        return weight if r is None else right(weight, r.mT)

    monkeypatch.setattr(burnin, "fold", wrong)
    gap = (said(burnin.burn_in(model)) - wanted).abs().max().item()
    with pytest.raises(Problem, match="not folded in correctly"):
        burnin.check_merge(gap, wanted.abs().max().item())


@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_it_is_as_near_to_the_truth_as_the_gated_model(kind, tmp_path):
    torch.manual_seed(0)
    FAMILIES["llama"]().save_pretrained(tmp_path / "base")
    truth = said(stirred(adapter.wrap(adapter.load_base(tmp_path / "base"), *KINDS[kind])))
    gated = stirred(adapter.wrap(adapter.load_base(tmp_path / "base", "bfloat16"), *KINDS[kind]))
    off = (said(gated) - truth).abs().mean()
    merged = burnin.burn_in(gated).to(torch.bfloat16)
    assert (said(merged) - truth).abs().mean() <= 1.5 * off


@pytest.mark.parametrize("block", [2, 4, 8, 16, 32])
def test_every_block_size_stays_a_rotation_in_training(block, tmp_path):
    torch.manual_seed(0)
    FAMILIES["phi3"]().save_pretrained(tmp_path / "base")
    model = adapter.wrap(adapter.load_base(tmp_path / "base"), Lora(rank=0), Gate(block=block)).train()
    optimizer, losses = torch.optim.AdamW(adapter.trained(model).values(), lr=3e-2), []
    for _ in range(20):
        loss = model(IDS, labels=IDS).loss
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    found = gate.check(model)
    assert found["error"] < 1e-5 and found["determinant"] > 0


def test_gradients_are_the_same_before_and_after_generating(tmp_path):
    "On CPUs with AVX512-BF16, bitsandbytes repacks 4-bit weights at the first evaluation, unless it is told not to."
    torch.manual_seed(0)
    FAMILIES["phi3"]().save_pretrained(tmp_path / "base")
    model = stirred(adapter.wrap(adapter.load_base(tmp_path / "base", quantization="nf4"), Lora(rank=4), Gate()))

    def gradients():
        model.train().zero_grad()
        model(IDS, labels=IDS).loss.backward()
        return {name: p.grad.clone() for name, p in adapter.trained(model).items()}

    before = gradients()
    model.eval().generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    after = gradients()
    assert all(torch.equal(g, after[name]) for name, g in before.items())


def test_disabled_and_merged_away_it_is_the_base(tmp_path):
    torch.manual_seed(0)
    FAMILIES["mistral"]().save_pretrained(tmp_path / "base")
    before = said(adapter.load_base(tmp_path / "base").eval())
    model = stirred(adapter.wrap(adapter.load_base(tmp_path / "base"), Lora(rank=4), Gate()))
    with model.disable_adapter():
        assert torch.equal(said(model), before)
    assert not torch.equal(said(model), before)
