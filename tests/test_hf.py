"""Attention handed to a handler, and contexts read in chunks, give the model's own logits."""

import pytest
import torch

from saap import hf
from saap.budget import Budget
from saap.training.capture import DenseAttention

from .conftest import random_model

GEMMA = {"sliding_window": 48, "query_pre_attn_scalar": 16}
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "phi3": {},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "smollm3": {},
    "cohere": {},
    "glm4": {},
    "cohere2": {"sliding_window": 48, "num_hidden_layers": 4},
    "exaone4": {"sliding_window": 48, "num_hidden_layers": 4},
    "gpt_oss": {"sliding_window": 48, "num_local_experts": 2, "num_experts_per_tok": 1},
}


def prompt(n=130):
    return torch.randint(1, 96, (1, n), generator=torch.Generator().manual_seed(3))


def dense_handler(n: int):
    """Dense attention of every layer, by the code that training runs layers with."""
    layers: dict[int, DenseAttention] = {}
    return lambda call: layers.setdefault(call.layer, DenseAttention(n))(call)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [400, 50])
def test_a_read_context_and_a_handler_equal_the_model(family, chunk):
    model = random_model(family, **FAMILIES[family])
    model.set_attn_implementation("eager")
    tokens = prompt()
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits[:, -1]
        handler, parts = dense_handler(130), []
        with hf.routed(model, handler):
            for start in range(0, 130, chunk):
                part = tokens[:, start : start + chunk]
                positions = torch.arange(start, start + part.shape[1])[None]
                parts.append(model(part, position_ids=positions, use_cache=False).logits)
        read = hf.read_context(model, tokens[0, :-1], chunk=chunk)
        with hf.attached(model, method="dense", budget=Budget(max_tokens=0)) as saap_model:
            cache = hf.cache_from(saap_model, read, 130)
            after = model(tokens[:, -1:], **hf.over(cache)).logits[:, -1]
    for ours in (parts[-1][:, -1], after):
        assert (ours - expected).abs().max() < 2e-5 * max(1.0, float(expected.abs().max()))
    assert model.config._attn_implementation == "eager"
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_derope_is_position_free():
    """The same token at two places has one de-RoPEd key in layer 0, and two RoPE'd ones."""
    model = random_model("llama")
    read = hf.read_context(model, torch.tensor([5, 7, 9, 5, 7, 5]))
    k_rope, _, k_derope = read.keys(0)
    assert (k_derope[0, :, 0] - k_derope[0, :, 5]).abs().max() < 1e-5
    assert (k_rope[0, :, 0] - k_rope[0, :, 5]).abs().max() > 1e-2


@pytest.mark.parametrize("chunk", [1, 7, 40, 64])
def test_queries_of_the_last_tokens_are_kept(chunk):
    model = random_model("llama")
    tokens = prompt(40)[0]
    whole = hf.read_context(model, tokens, n_queries=40)
    some = hf.read_context(model, tokens, n_queries=9, chunk=chunk)
    assert whole.length == some.length == 40
    for layer in range(2):
        for few, every in zip(some.queries[layer], whole.queries[layer], strict=True):
            assert few.shape == (9, 4, 16)
            assert (few - every[-9:]).abs().max() < 1e-5
    with pytest.raises(ValueError, match=r"n_queries must be in 0\.\.40; got 41"):
        hf.read_context(model, tokens, n_queries=41)


def test_model_without_rope_is_refused():
    model = random_model("gpt2", n_embd=64, n_layer=2, n_head=4)
    with pytest.raises(ValueError, match=r"a rotary position embedding .*; got model_type='gpt2'"):
        hf.attention_modules(model)


def test_missing_model_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"must be a folder with config\.json"):
        hf.load_model(tmp_path / "nothing")
