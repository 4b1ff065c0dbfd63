"""Layers that keep latents (MLA): searched and attended as they are, they answer as expanded."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import saap
from saap import context_file, hf
from saap.budget import Budget
from saap.eval.tasks.attention import LayerProblem
from saap.hf import latent, models, options
from saap.index import tensor_files
from saap.index.rows import BucketRows
from saap.methods import METHODS, find_method
from saap.training import train

from .test_families import make
from .test_generate import assert_same_logits, generated, prompt

pytestmark = pytest.mark.many_steps

FULL = Budget(max_tokens=10_000, n_sink=4, window=8)
FEW = Budget(max_tokens=64, n_sink=4, window=8, flush_every=32)


@pytest.fixture(scope="module")
def model():
    return make("deepseek_v3")


def attention_of(model):
    return next(m for m in model.modules() if latent.is_latent(m))


@pytest.mark.parametrize("family", ["deepseek_v2", "minicpm3", "longcat_flash"])
def test_absorbed_is_expanded(family):
    """In float64: scores of all heads, and what their values add up to."""
    module = attention_of(make(family)).double()
    draw = torch.Generator().manual_seed(0)
    n, heads = 50, module.num_heads
    own = torch.randn(2, 1, n, module.kv_lora_rank, generator=draw).double()
    rotated = torch.randn(2, 1, n, module.qk_rope_head_dim, generator=draw).double()
    dim = module.qk_nope_head_dim + module.qk_rope_head_dim
    q = torch.randn(2, heads, 3, dim, generator=draw).double()
    keys, values = module.expand_kv(own, rotated)
    joined, same = latent.joined(own, rotated)
    assert torch.equal(joined, same)
    scores = latent.absorbed(module, q) @ joined.mT
    assert torch.allclose(scores, q @ keys.mT, rtol=0, atol=1e-12)
    weights = scores.softmax(-1)
    found = latent.values_of(module, weights @ joined)
    assert torch.allclose(found, weights @ values, rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_layer_is_one_kv_head_whose_values_are_its_keys(model):
    config = model.config
    with saap.attached(model, budget=FEW) as saap_model:
        cache = saap_model.cache()
        model(prompt(1, 40), **hf.over(cache))
        for layer in cache.saap_layers:
            k = layer.store.k[:, :, :40]
            assert k.shape == (1, 1, 40, config.kv_lora_rank + config.qk_rope_head_dim)
            assert layer.store.v is layer.store.k  # held once
    assert models.heads_of(config) == (4, 1, 48)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name, own in METHODS.items() if not own.needs_index])
def test_every_method_finds_all_rows_or_few(model, name):
    tokens = prompt(1, 1600, seed=4)
    own = model(tokens).logits[:, -3:]
    for budget in (FULL, FEW):
        with saap.attached(model, budget=budget, method=name) as saap_model:
            cache = saap_model.cache()
            model(tokens[:, :-3], **hf.over(cache))
            found = [model(t[None, None], **hf.over(cache)).logits[:, 0] for t in tokens[0, -3:]]
            found = torch.stack(found, 1)
        if budget is FULL:
            assert_same_logits(found, own)
            assert cache.visited_share == 1
        elif name != "dense":
            assert cache.visited_share < 0.3
            assert found.isfinite().all()


@torch.no_grad()
def test_few_rows_are_the_best_ones(model):
    """Of the rows that `saap` visits, heads find nearly what the same number of best ones hold."""
    read = hf.read_context(model, prompt(1, 1500, seed=6)[0], n_queries=4)
    layer = hf.model_layers(model)[1]
    q, _ = read.queries[1]
    k, _, _ = read.keys(1)
    with saap.attached(model, budget=FEW) as saap_model:
        store = hf.cache_from(saap_model, read).layers[1].store
        starts, lengths = store.select(q[-1:], q[-1:])
    scores = (q[-1] @ k[0, 0].T) * layer.info.sm_scale
    mass = scores.softmax(-1).sum(0)
    chosen = torch.zeros_like(mass)
    for start, length in zip(starts[0, 0].tolist(), lengths[0, 0].tolist(), strict=True):
        chosen[start : start + length] = 1
    best = mass.topk(int(chosen.sum())).values.sum()
    assert (mass * chosen).sum() > 0.97 * best
    assert chosen.mean() < 0.1


def test_rows_of_one_vector_are_moved_as_those_of_two():
    draw = torch.Generator().manual_seed(0)
    once, twice = BucketRows(same={"v": "k"}), BucketRows()
    for both in (once, twice):
        both.reserve(40, torch.empty(2, 1, 0, 8), 0)
    k = torch.randn(2, 1, 40, 8, generator=draw)
    orders = [torch.randperm(40, generator=draw)[None] for _ in range(2)]
    few = torch.cat([torch.arange(36), torch.tensor([37, 36, 39, 38])])[None]
    for rows in (once, twice):
        rows.write(slice(None), 0, (k, k), 3)
        for b, order in enumerate(orders):
            rows.permute(b, 0, order)
        rows.permute(0, 0, few, 36)
        rows.select(torch.tensor([1, 0, 1]), 40)
        rows.reserve(200, rows.vectors["k"], 40)
        rows.select(torch.tensor([0, 0, 1]), 40)
    for name in ("k", "v"):
        assert torch.equal(once.vectors[name][:, :, :40], twice.vectors[name][:, :, :40])
    assert torch.equal(once.tokens[..., :40], twice.tokens[..., :40])
    assert once.vectors["v"] is once.vectors["k"]
    assert twice.nbytes - once.nbytes == once.vectors["k"].nbytes


@torch.no_grad()
def test_a_latent_is_held_and_read_once(model):
    """Also after the cache has grown, was put in another order, copied, cut, saved and opened."""
    tokens = prompt(2, 1300, seed=3)
    own = model(tokens).logits[:, -1]
    with saap.attached(model, budget=FULL, method="kmeans-online") as saap_model:
        cache = saap_model.cache()
        for part in tokens[[1, 0]].split(200, 1):
            model(part, **hf.over(cache))
        cache.reorder_cache(torch.tensor([1, 0]))
        cache = copy.deepcopy(cache)
        model(tokens[:, :5], **hf.over(cache))
        cache.crop(-6)
        assert_same_logits(model(tokens[:, -1:], **hf.over(cache)).logits[:, 0], own)
        cache.batch_select_indices(torch.tensor([1]))
        for layer in cache.saap_layers:
            assert layer.store.v is layer.store.k
            assert layer.store.bytes_read < 1.2 * 1300 * 48 * 4
            rows = layer.store.rows
            assert rows.nbytes == rows.capacity * (48 * 4 + 8)


def assert_refused(saap_model, path, message):
    with pytest.raises(ValueError, match=message):
        saap_model.open_context(path)


@torch.no_grad()
def test_an_opened_latent_is_held_once(model, tmp_path):
    tokens, path = prompt(1, 700, seed=3), tmp_path / "context"
    own = model(tokens).logits[:, -20:]
    with saap.attached(model, budget=FULL) as saap_model:
        cache = saap_model.cache()
        model(tokens[:, :-20], **hf.over(cache))
        saap_model.save_context(cache, tokens[0, :-20], path)
        again, _ = saap_model.open_context(path)
        assert all(layer.store.v is layer.store.k for layer in again.saap_layers)
        found = [model(t, **hf.over(again)).logits for t in tokens[:, -20:].split(1, 1)]
        assert_same_logits(torch.cat(found, 1), own)
    header, tensors = tensor_files.read(path, context_file.FORMAT)
    assert "layers.0.k" in tensors
    assert "layers.0.v" not in tensors
    for change, message in (
        (lambda state: state.pop("one_vector"), "layers.0.v"),
        (lambda state: state.update(one_vector=1), "one_vector"),
    ):
        altered = copy.deepcopy(header)
        change(altered["layers"][0])
        tensor_files.write(path, context_file.FORMAT, altered, tensors)
        with saap.attached(model, budget=FULL) as saap_model:
            assert_refused(saap_model, path, message)
    del header["layers"][0]["one_vector"]
    tensor_files.write(
        path, context_file.FORMAT, header, tensors | {"layers.0.v": tensors["layers.0.k"]}
    )
    with saap.attached(model, budget=FULL) as saap_model:
        assert_refused(saap_model, path, "values must be held as the model has them")


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8])
def test_latents_are_held_narrower(model, kv_dtype):
    tokens = prompt(1, 300, seed=2)
    with torch.no_grad(), saap.attached(model, budget=FULL, kv_dtype=kv_dtype) as saap_model:
        cache = saap_model.cache()
        found = [model(t, **hf.over(cache)).logits for t in tokens.split(100, 1)]
        own = model(tokens).logits
    error = (torch.cat(found, 1) - own).abs().max() / own.abs().max()
    assert 0 < error < 0.05


def test_drafts_are_verified(model):
    inputs = {"input_ids": prompt(1, 600), "attention_mask": torch.ones(1, 600).long()}
    expected = generated(model, inputs, max_new_tokens=20)
    with saap.attached(model, budget=FEW, verify=4) as saap_model:
        found = generated(model, inputs, max_new_tokens=20, **hf.over(saap_model.cache()))
    assert torch.equal(found, expected)


def test_beams_and_batches(model):
    mask = (torch.arange(60) >= torch.tensor([0, 33])[:, None]).long()
    inputs = {"input_ids": prompt(2, 60), "attention_mask": mask}
    expected = generated(model, inputs, max_new_tokens=12, num_beams=3)
    with saap.attached(model, budget=FULL) as saap_model:
        found = generated(
            model, inputs, max_new_tokens=12, num_beams=3, **hf.over(saap_model.cache())
        )
    assert torch.equal(found, expected)


@torch.no_grad()
def test_transformers_own_cache_goes_on_from_what_was_read(model):
    tokens = prompt(1, 60)[0]
    read = hf.read_context(model, tokens[:40])
    theirs = hf.dynamic_cache_from(model, read)
    own = model(tokens[None]).logits[:, 40:]
    assert_same_logits(model(tokens[None, 40:], **hf.over(theirs)).logits, own)


@torch.no_grad()
def test_an_index_is_trained(model):
    tokens = torch.randint(1, 96, (3, 400), generator=torch.Generator().manual_seed(1))
    index = train(model, tokens, nlist=8, steps=5, hidden=8, window=32)
    text = prompt(1, 120)
    own = model(text).logits
    for method in ("saap", "kmeans"):
        with saap.attached(model, index, FULL, method=method) as saap_model:
            cache = saap_model.cache()
            found = [model(t, **hf.over(cache)).logits for t in text.split((110, *[1] * 10), 1)]
        assert_same_logits(torch.cat(found, 1), own)


@torch.no_grad()
def test_the_model_is_left_as_it_was(model):
    tokens = prompt(1, 30)
    own = model(tokens).logits
    with saap.attached(model, budget=FULL) as saap_model:
        assert torch.equal(model(tokens).logits, own)  # without our cache: its own code
        copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        with hf.routed(model, lambda call: (0 * call.q_rope, call.q_rope[..., 0])):
            assert not torch.equal(model(tokens, use_cache=False).logits, own)
        assert_same_logits(model(tokens, **hf.over(saap_model.cache())).logits, own)
        assert "expand_kv" in vars(attention_of(model))
    assert "expand_kv" not in vars(attention_of(model))
    for other in (copied, pickled):
        assert torch.equal(other(tokens).logits, own)
        with saap.attached(other, budget=FULL) as saap_model:
            assert_same_logits(other(tokens, **hf.over(saap_model.cache())).logits, own)
        assert torch.equal(other(tokens).logits, own)
    assert torch.equal(model(tokens).logits, own)


class Quantized(nn.Linear):
    pass


class Packed(torch.Tensor):
    pass


def quantized(own):
    return Quantized(own.in_features, own.out_features, bias=False)


def biased(own):
    return nn.Linear(own.in_features, own.out_features)


def hooked(own):
    own.register_forward_hook(lambda module, inputs, out: 1.5 * out)
    return own


def replaced(own):
    own.forward = lambda x: 1.5 * type(own).forward(own, x)
    return own


def packed(own):
    own.weight = nn.Parameter(own.weight.detach().as_subclass(Packed))
    return own


@pytest.mark.parametrize(
    "change", [quantized, biased, hooked, replaced, packed, lambda own: own.to("meta")]
)
def test_maps_that_are_not_plain_matrices_are_refused(change):
    """Also where one takes a matrix's place while the model is attached."""
    message = r"kv_b_proj, .* must be a torch.nn.Linear without bias and hooks, in memory and"
    model = make("minicpm3")
    module = attention_of(model)
    with saap.attached(model, budget=FULL) as saap_model, torch.no_grad():
        module.kv_b_proj = change(module.kv_b_proj)
        with pytest.raises(ValueError, match=message):
            model(prompt(1, 20), **hf.over(saap_model.cache()))
    with pytest.raises(ValueError, match=message):
        hf.model_layers(model)


def test_layers_of_several_attentions_are_not_trained():
    tokens = torch.randint(1, 96, (3, 400))
    with pytest.raises(ValueError, match=r"must have one attention to be run by itself, .* got"):
        train(make("longcat_flash"), tokens, nlist=8, steps=5, hidden=8, window=32)


def test_a_latent_is_read_once_where_methods_are_judged(model):
    read = hf.read_context(model, prompt(1, 400)[0], n_queries=4)
    problem = LayerProblem(read, hf.model_layers(model)[1].info, FEW)
    store = problem.store_for(find_method("dense")())
    found = problem.measure(store, FEW)
    assert store.v is store.k
    assert found["bytes_read"] < 1.01 * 400 * 48 * 4


def test_other_devices_and_groups_are_refused(model):
    on_gpu = SimpleNamespace(config=model.config, device=torch.device("cuda"))
    with pytest.raises(ValueError, match=r"must be on the CPU, .* got cuda and 48 dimensions"):
        options.check_latents(on_gpu, None)
    with pytest.raises(ValueError, match="group must be None where layers keep latents; got"):
        saap.attached(model, group=object()).__enter__()
