"""Layers run one at a time over stored hidden states are the model's own computation."""

import pytest
import torch

from saap import hf
from saap.hf.layerwise import LayerStream, StopLayer, decoder_layers
from saap.training.capture import DenseAttention

from .conftest import random_model
from .test_hf import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_at_a_time_is_the_whole_model(family):
    chunk = 50
    model = random_model(family, **{"num_hidden_layers": 3, **FAMILIES[family]})
    tokens = torch.randint(1, 96, (130,), generator=torch.Generator().manual_seed(3))
    whole: dict[int, DenseAttention] = {}
    with (
        torch.no_grad(),
        hf.routed(model, lambda call: whole.setdefault(call.layer, DenseAttention(130))(call)),
    ):
        for part in torch.arange(130).split(chunk):
            model(tokens[None, part], position_ids=part[None], use_cache=False)
    stream, hidden = LayerStream(model, chunk=chunk), None
    for layer in range(len(whole)):
        alone = DenseAttention(130)
        hidden = stream.run(layer, tokens, hidden, alone)
        for name in ("k", "v"):
            ours, expected = (
                getattr(own.store, name)[:, :, :130] for own in (alone, whole[layer])
            )
            assert torch.equal(ours, expected), layer
    assert hidden.shape == (1, 130, 64)


def test_the_model_is_as_before():
    model = random_model("llama")
    tokens = torch.arange(1, 40)
    expected = model(tokens[None]).logits
    before = model.config._attn_implementation
    LayerStream(model).run(1, tokens, torch.zeros(1, 39, 64), DenseAttention(39))
    assert not any("forward" in vars(m) for m in model.modules())
    assert model.config._attn_implementation == before
    assert torch.equal(model(tokens[None]).logits, expected)


def test_a_handler_that_has_seen_enough_ends_the_layer():
    calls = []

    def look(call):
        calls.append(call.k_rope.shape[2])
        raise StopLayer

    model = random_model("llama")
    assert LayerStream(model, chunk=20).run(0, torch.arange(1, 51), None, look) is None
    assert calls == [20, 20, 10]


def test_an_error_in_a_handler_leaves_the_model_whole():
    def fails(call):
        raise ZeroDivisionError

    model = random_model("llama")
    with pytest.raises(ZeroDivisionError):
        LayerStream(model).run(1, torch.arange(1, 20), torch.zeros(1, 19, 64), fails)
    assert not any("forward" in vars(m) for m in model.modules())


def test_decoder_layers_are_what_the_model_loops_over():
    model = random_model("gemma2")
    assert decoder_layers(model) == list(model.model.layers)
