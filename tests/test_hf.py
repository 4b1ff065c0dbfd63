"""Routing a model's attention through a handler gives the model's own logits."""

import pytest
import torch

from saap import hf
from saap.prefill import DensePrefill

from .conftest import random_model

FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "phi3": {},
    "gemma2": {"sliding_window": 48, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 48, "query_pre_attn_scalar": 16},
    "smollm3": {},
    "cohere": {},
    "glm4": {},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [400, 50])
def test_dense_prefill_equals_the_model(family, chunk):
    model = random_model(family, **FAMILIES[family])
    tokens = torch.randint(1, 96, (1, 130), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = model(tokens, use_cache=False).logits[:, -1]
        ours = hf.run_chunks(model, tokens, DensePrefill(130), chunk=chunk)
    scale = expected.abs().max()
    assert (ours - expected).abs().max() < 2e-5 * max(1.0, float(scale))
    assert model.config._attn_implementation == "eager"
    assert not any(hasattr(m, "_saap_call") for m in model.modules())


def test_derope_is_position_free():
    """The same token at two places has one de-RoPEd key in layer 0, and two RoPE'd ones."""
    model = random_model("llama")
    tokens = torch.tensor([[5, 7, 9, 5, 7, 5]])
    taken = DensePrefill(6)
    hf.run_chunks(model, tokens, taken)
    k_rope, _, k_derope = taken.caches[0].views()
    assert (k_derope[0, :, 0] - k_derope[0, :, 5]).abs().max() < 1e-5
    assert (k_rope[0, :, 0] - k_rope[0, :, 5]).abs().max() > 1e-2


def test_model_without_rope_is_refused():
    model = random_model("gpt2", n_embd=64, n_layer=2, n_head=4)
    with pytest.raises(ValueError, match="model_type='gpt2' has no rotary position embedding"):
        hf.attention_modules(model)


def test_learned_sinks_are_refused():
    model = random_model("gpt_oss", num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises(ValueError, match="learned attention sinks are not supported"):
        hf.run_chunks(model, torch.tensor([[1, 2, 3]]), DensePrefill(3))


def test_cache_too_small_is_an_error():
    with pytest.raises(ValueError, match="6 tokens: accepted are at most capacity=4"):
        hf.run_chunks(random_model("llama"), torch.ones(1, 6, dtype=torch.long), DensePrefill(4))


def test_missing_model_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"accepted is a folder with config\.json"):
        hf.load_model(tmp_path / "nothing")
