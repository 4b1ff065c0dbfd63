"""The `blend` without a trained index: each layer clusters the keys of the prompt itself."""

import pytest
import torch

import saap
from saap import hf
from saap.budget import Budget
from saap.kv import KVStore
from saap.methods import find_method
from saap.methods.learned import PromptSelector
from saap.partition import partition_keys
from saap.selector import LayerInfo

from .test_generate import generated, make, prompt

LENGTH = 1100
SHORTER = 300
PLACES = {"n_sink": 4, "window": 16, "flush_every": 16}
WHOLE = Budget(max_tokens=10**6, **PLACES)
FEW = Budget(max_tokens=50, **PLACES)
FAMILIES = ["llama", "gemma3", "smollm3", "gpt_oss", "phi3", "glm4"]


def inputs(*lengths):
    mask = (torch.arange(LENGTH) >= LENGTH - torch.tensor(lengths)[:, None]).long()
    return {"input_ids": prompt(len(lengths), LENGTH), "attention_mask": mask}


@pytest.mark.parametrize("family", FAMILIES)
def test_with_the_full_budget_tokens_are_those_of_dense(family):
    model = make(family)
    given = inputs(LENGTH, SHORTER)
    expected = generated(model, given)
    with saap.attached(model, budget=WHOLE, method="blend") as saap_model:
        cache = saap_model.cache(capacity=LENGTH + 40)
        assert torch.equal(generated(model, given, **hf.over(cache)), expected)
        if family != "phi3":  # longrope drops the cache where its tables switch
            assert all(layer.store.selector.ready for layer in cache.saap_layers)
            assert all(min(layer.store.middles) > 0 for layer in cache.saap_layers)


def test_few_rows_are_visited():
    model = make("llama")
    with saap.attached(model, budget=FEW, method="blend") as saap_model:
        cache = saap_model.cache()
        generated(model, inputs(LENGTH), **hf.over(cache))
        assert cache.visited_share < 0.1
        store = cache.saap_layers[0].store
        tail = store.lengths[0] - PLACES["n_sink"] - store.middles[0]
        visited = PLACES["n_sink"] + tail + 50
        assert cache.visited_share == pytest.approx(visited / store.lengths[0])


def test_short_prompts_and_what_follows_stay_dense():
    model = make("llama")
    given = {"input_ids": prompt(1, 200), "attention_mask": torch.ones(1, 200)}
    expected = generated(model, given)
    with saap.attached(model, budget=FEW, method="blend") as saap_model:
        cache = saap_model.cache()
        assert torch.equal(generated(model, given, **hf.over(cache)), expected)
        assert cache.visited_share == 1.0
        assert not cache.saap_layers[0].store.selector.ready


def test_dense_layers_stay_dense():
    model = make("llama")
    budget = Budget(max_tokens=50, dense_layers=(1,), **PLACES)
    with saap.attached(model, budget=budget, method="blend") as saap_model:
        cache = saap_model.cache()
        generated(model, inputs(LENGTH), **hf.over(cache))
        assert cache.saap_layers[0].store.selector.ready
        assert cache.saap_layers[1].store.selector is None


def test_what_needs_a_trained_index_says_so(tmp_path):
    model = make("llama")
    with pytest.raises(ValueError, match=r"method 'mlp' needs a trained index .*; got none"):
        saap.attached(model, method="mlp").__enter__()
    with saap.attached(model, budget=FEW, method="blend") as saap_model:
        cache = saap_model.cache()
        with pytest.raises(ValueError, match="a context of method 'blend' needs a trained index"):
            saap_model.save_context(cache, prompt()[0], tmp_path / "c.saap")
        with pytest.raises(ValueError, match="a context of method 'blend' needs a trained index"):
            saap_model.open_context(tmp_path / "c.saap")
    assert not list(tmp_path.iterdir())


def test_padding_has_no_part_in_the_partition():
    keys = torch.randn(2, 2, 1200, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(1200) >= torch.tensor([0, 800])[:, None]
    noisy = keys.masked_fill(~mask[:, None, :, None], torch.nan)
    options = {"sm_scale": 0.25, "mask": mask, "nlist": 8}
    found = [partition_keys(k, None, **options).centroids for k in (keys, noisy)]
    assert found[0].isfinite().all()
    assert torch.equal(*found)


def test_more_frequencies_than_the_head_has_pairs_are_refused():
    keys = torch.randn(1, 2, 1200, 16, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"head_dim / 2 = 8 frequencies; got \[64\]"):
        partition_keys(keys, torch.ones(64), sm_scale=0.25)


def test_a_prompt_that_repeats_itself_has_a_partition():
    sentence = torch.randn(1, 2, 15, 16, generator=torch.Generator().manual_seed(0))
    for keys in (sentence.repeat(1, 1, 80, 1), sentence[:, :, :1].repeat(1, 1, 1200, 1)):
        routing = partition_keys(keys, torch.ones(8), sm_scale=0.25)
        assert routing.centroids.isfinite().all()
        assert routing.key_scale.isfinite().all()


def test_a_store_that_holds_tokens_keeps_its_partition():
    """It is that of the first tokens: a short prompt has none, and later ones do not give one."""
    keys = torch.randn(1, 2, 2400, 16, generator=torch.Generator().manual_seed(0))
    store = KVStore(PromptSelector(LayerInfo(0.25), 0), FEW)
    store.append(*[keys[:, :, :1200]] * 3)
    before = store.selector.routing
    store.append(*[keys[:, :, 1200:]] * 3)
    assert store.selector.routing is before is not None
    short = KVStore(PromptSelector(LayerInfo(0.25), 0), FEW)
    for part in (keys[:, :, :300], keys[:, :, 300:]):
        short.append(part, part, part)
    assert short.selector.routing is None


def test_the_first_append_makes_the_partition_and_later_ones_keep_it():
    keys = torch.randn(1, 2, 1200, 16, generator=torch.Generator().manual_seed(0))
    method = find_method("blend")()
    stores = [KVStore(method.selector(LayerInfo(0.25)), FEW) for _ in range(2)]
    for store, n in zip(stores, (1200, 900), strict=True):
        store.append(*[keys[:, :, :n]] * 3)
    first = stores[0].selector.routing
    for store in stores:
        store.append(*[keys[:, :, -300:]] * 3)
        store.flush()
    assert stores[0].selector.routing is first
    assert stores[0].middles == [1472]  # all but 4 sinks and a window of 16: 1480, in sixteens
    assert not stores[1].selector.ready  # its first tokens were too few
    assert stores[1].middles == [0]


def test_the_reference_model_finds_far_keys_with_it():
    """The rows of the middle that its copying heads look at most, in a few percent of them."""
    from saap.eval import reference

    model = hf.load_model(reference.FOLDER)
    text = torch.tensor(list(reference.split_held_out()[1][:2000]))
    tokens = torch.cat([text, text[300:700]])[None]
    found = []
    with torch.no_grad():
        for budget in (WHOLE, FEW, Budget(max_tokens=0, **PLACES)):
            with saap.attached(model, budget=budget, method="blend") as saap_model:
                cache = saap_model.cache()
                model(tokens[:, :-40], **hf.over(cache))
                logits = [
                    model(tokens[:, i : i + 1], **hf.over(cache)).logits[0, 0]
                    for i in range(tokens.shape[1] - 40, tokens.shape[1] - 1)
                ]
            targets = tokens[0, -39:]
            found.append(torch.stack(logits).float().log_softmax(-1)[range(39), targets].mean())
    dense, few, none = found
    assert few > dense - 0.3 * (dense - none)
