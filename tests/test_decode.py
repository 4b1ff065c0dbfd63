"""Decoding over the store: sparse steps, appended tokens, invariance to the order of rows."""

import pytest
import torch

from saap import hf
from saap.budget import Budget
from saap.decode import LayerDecoder, SparseDecode
from saap.methods import find_method
from saap.prefill import DensePrefill
from saap.store import LayerStore

from .conftest import random_model


def prefilled(model, tokens):
    taken = DensePrefill(tokens.shape[1])
    hf.run_chunks(model, tokens, taken)
    return taken


@pytest.mark.parametrize("share", ["group", "head"])
@pytest.mark.parametrize("name", ["dense", "saap", "kmeans", "kmeans-rope", "streaming"])
def test_full_budget_decode_equals_dense_logits(tiny_model, tiny_tokens, tiny_index, name, share):
    tokens = tiny_tokens[:1]
    with torch.no_grad():
        expected = tiny_model(tokens, use_cache=False).logits[:, -1]
    decode = SparseDecode(
        prefilled(tiny_model, tokens[:, :280]), find_method(name)(tiny_index),
        Budget(max_tokens=10**6, n_sink=4, window=32, share=share),
    )  # fmt: skip
    logits = hf.run_chunks(tiny_model, tokens[:, 280:], decode, start=280)
    assert (logits - expected).abs().max() < 2e-5 * max(1.0, float(expected.abs().max()))
    assert decode.visited.selectivity == 1.0


def test_small_budget_visits_what_it_says(tiny_model, tiny_tokens, tiny_index):
    budget = Budget(max_tokens=20, n_sink=4, window=32)
    decode = SparseDecode(
        prefilled(tiny_model, tiny_tokens[:1, :280]), find_method("saap")(tiny_index), budget
    )
    hf.run_chunks(tiny_model, tiny_tokens[:1, 280:281], decode, start=280)
    assert decode.visited.rows / decode.visited.steps == 4 + 32 + 1 + 20
    assert decode.visited.cached / decode.visited.steps == 281


def test_softcapped_model_decodes():
    model = random_model("gemma2", sliding_window=4096, query_pre_attn_scalar=16)
    tokens = torch.randint(1, 96, (1, 90), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = model(tokens, use_cache=False).logits[:, -1]
    decode = SparseDecode(
        prefilled(model, tokens[:, :80]), find_method("dense")(), Budget(max_tokens=1, window=16)
    )
    logits = hf.run_chunks(model, tokens[:, 80:], decode, start=80)
    assert (logits - expected).abs().max() < 2e-5 * max(1.0, float(expected.abs().max()))


def test_order_of_rows_does_not_matter():
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, 2, 90, 16, generator=generator)
    q = torch.randn(1, 4, 16, generator=generator)
    order = torch.randperm(90 - 4 - 16, generator=generator).expand(1, 2, -1)
    budget = Budget(max_tokens=10**6, n_sink=4, window=16)
    dense = find_method("dense")()
    outs = []
    for permutation in (None, order):
        decoder = LayerDecoder.from_cache(0, k, v, k, dense, budget, n_heads=4, sm_scale=0.25)
        decoder.store = LayerStore(k, v, n_sink=4, window=16, order=permutation)
        outs.append(decoder.attend(q, q, sm_scale=0.25)[0])
    assert (outs[0] - outs[1]).abs().max() < 1e-6


def test_append_step_by_step_equals_at_once():
    k, v = torch.randn(2, 1, 2, 40, 8)
    one, many = (LayerStore(k[:, :, :30], v[:, :, :30], n_sink=4, window=8) for _ in range(2))
    one.append(k[:, :, 30:], v[:, :, 30:])
    for t in range(30, 40):
        many.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
    assert torch.equal(one.k[:, :, :40], many.k[:, :, :40])
    assert one.local_ranges() == many.local_ranges() == [(0, 4), (22, 18)]


def test_store_limits():
    k = torch.randn(1, 2, 40, 8)
    store = LayerStore(k, k, n_sink=4, window=8, spare=2)
    with pytest.raises(ValueError, match="43 tokens: accepted are at most capacity=42"):
        store.append(k[:, :, :3], k[:, :, :3])
    with pytest.raises(ValueError, match="length=31: accepted are 32 to 40"):
        store.truncate(31)
    store.truncate(35)
    assert store.local_ranges() == [(0, 4), (32, 3)]
    with pytest.raises(ValueError, match=r"order has shape \(1, 2, 3\)"):
        LayerStore(k, k, n_sink=4, window=8, order=torch.zeros(1, 2, 3, dtype=torch.long))
