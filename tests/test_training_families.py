"""Training on models whose layers differ: windows, layers without RoPE, learned sinks."""

import pytest
import torch

import saap
from saap import hf
from saap.budget import Budget
from saap.hf.layerwise import LayerStream
from saap.masses import attention_masses
from saap.training import train
from saap.training.capture import KeySampler, SampledKeys

from .test_cli import run_cli
from .test_generate import assert_same_logits, logits_of
from .test_one_path import built, text

FAMILIES = ("cohere2", "exaone4", "gpt_oss", "gemma3")
NOPE = ("cohere2", "exaone4")  # their layers of full attention have no RoPE
OPTIONS = {"nlist": 8, "steps": 10, "hidden": 16, "window": 16, "baselines": True}


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    model = built(request.param)
    tokens = torch.randint(1, 96, (4, 300), generator=torch.Generator().manual_seed(1))
    return request.param, model, train(model, tokens, **OPTIONS)


def test_layers_with_a_window_get_no_index(case):
    _, model, index = case
    full = [layer.is_full for layer in hf.model_layers(model)]
    assert True in full
    assert False in full
    assert [own is not None for own in index.layers] == full
    for layer, own in zip(hf.model_layers(model), index.layers, strict=True):
        if own is not None:
            assert own.sm_scale == pytest.approx(layer.info.sm_scale)


def test_keys_without_rope_are_left_untouched(case):
    family, model, index = case
    tokens = text(120)
    seen = 0
    with torch.no_grad():
        states = model(tokens[None], output_hidden_states=True).hidden_states
    for layer in hf.model_layers(model):
        if not layer.is_full:
            continue
        number, kept = layer.info.number, SampledKeys()
        sampler = KeySampler(torch.arange(120), kept, with_rope=True)
        hidden = None if number == 0 else states[number]
        LayerStream(model).run(number, tokens, hidden, sampler)
        same = torch.equal(torch.cat(kept.derope, 1), torch.cat(kept.rope, 1))
        assert same == (family in NOPE)
        assert (kept.inv_freq is None) == (layer.info.inv_freq is None) == same
        own = index.layers[number]
        assert (own.inv_freq is None) == same
        if same:  # then keys with and without RoPE are clustered alike
            assert torch.equal(own.centroids, own.centroids_rope)
        seen += 1
    assert seen


def test_an_index_is_saved_loaded_used_and_shown(case, tmp_path, monkeypatch, capsys):
    _, model, index = case
    path = tmp_path / "index.safetensors"
    index.save(path)
    again = saap.TrainedIndex.load(path)
    assert [own is None for own in again.layers] == [own is None for own in index.layers]
    assert again.tensors().keys() == index.tensors().keys()
    for name, tensor in index.tensors().items():
        assert torch.equal(again.tensors()[name], tensor)
    budget = Budget(max_tokens=10**6, n_sink=4, window=16, flush_every=8)
    tokens = text(120)[None]
    with torch.no_grad():
        expected = model(tokens).logits
    for method in ("saap", "mlp", "kmeans-cells", "kmeans-rope"):
        with saap.attached(model, again, budget, method=method) as saap_model:
            ours = logits_of(model, tokens, cuts=(112, 116, 117), cache=saap_model.cache())
        assert_same_logits(ours, expected)
    code, out, _ = run_cli(monkeypatch, capsys, "info", path)
    assert code == 0
    assert "nlist 8" in out


def test_masses_account_for_learned_sinks():
    """They are softmax over keys and the sink; what the sink gets is outside of the middle."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 40, 16, generator=generator)
    k = torch.randn(1, 2, 40, 16, generator=generator)
    buckets = torch.randint(0, 5, (1, 2, 40), generator=generator, dtype=torch.int32)
    sinks = torch.tensor([-1.0, 0.5, 2.0, 5.0])
    places = torch.arange(40)
    found = attention_masses(
        q, k, buckets, places, 5, sm_scale=0.25, n_sink=3, window=8, sinks=sinks
    ).buckets  # fmt: skip
    for head in range(4):
        for t in (20, 39):
            scores = k[0, head // 2, : t + 1] @ q[0, head, t] * 0.25
            weights = torch.cat([scores, sinks[head, None]]).softmax(-1)[:-1]
            weights[:3] = 0
            weights[t + 1 - 8 :] = 0
            true = torch.zeros(5).scatter_add_(0, buckets[0, head // 2, : t + 1].long(), weights)
            assert (found[0, head, t, :5] - true).abs().max() < 1e-6
            assert found[0, head, t, 5] == pytest.approx(1 - float(true.sum()), abs=1e-6)


def test_training_of_gpt_oss_sees_its_sinks():
    """A model whose sinks take everything has nothing to look for in the middle."""
    tokens = torch.randint(1, 96, (4, 300), generator=torch.Generator().manual_seed(1))
    masses = []
    for sink in (-1e4, 1e4):
        model = built("gpt_oss")
        for module in hf.attention_modules(model).values():
            torch.nn.init.constant_(module.sinks, sink)
        index = train(model, tokens, **OPTIONS)
        full = [n for n, own in enumerate(index.layers) if own is not None]
        masses.append(max(max(index.metadata["recall"]["middle_mass"][n]) for n in full))
    assert masses[0] > 0.5
    assert masses[1] < 1e-6
