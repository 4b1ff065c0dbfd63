"""Caches filled under inference mode, and arguments that are no tensors."""

import pytest
import torch

import saap

from .test_generate import FULL, SMALL, call, make, prompt, random_index
from .test_threads import decoded


@pytest.mark.parametrize("method", ["blend", "saap", "quest", "kmeans-online", "moments-pages"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_cache_filled_under_inference_mode_goes_on_outside(family, method):
    model = make(family)
    index, tokens, budget = random_index(model), prompt(1, 90), SMALL
    if method not in ("blend",):
        budget = saap.Budget(max_tokens=16, n_sink=4, window=8, flush_every=8)
    with saap.attached(model, index, budget, method=method) as saap_model:
        whole, mixed = saap_model.cache(), saap_model.cache()
        expected = decoded(model, tokens, whole, n=20)
        with torch.inference_mode():
            found = decoded(model, tokens, mixed, n=7)
            mixed.batch_select_indices(torch.tensor([0]))
            found += decoded(model, torch.tensor([found[-1:]]), mixed, n=4)
        found += decoded(model, torch.tensor([found[-1:]]), mixed, n=9)
        assert found == expected
        if family == "gemma3":  # a window that has moved on cannot be moved back
            return
        with torch.inference_mode():
            for cache in (whole, mixed):
                cache.crop(-5)
        last = torch.tensor([expected[-5:-4]])
        assert decoded(model, last, whole, n=9) == decoded(model, last, mixed, n=9)


def test_attention_weights_are_refused():
    model = make("llama")
    model.set_attn_implementation("eager")
    with saap.attached(model, random_index(model), FULL, method="blend") as saap_model:
        with pytest.raises(ValueError, match="output_attentions must be False over a SaapCache"):
            call(model, saap_model.cache(), output_attentions=True)
        assert len(call(model, None, output_attentions=True).attentions) == 2


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ["q", "k", "v", "starts", "lengths"])
def test_what_is_no_tensor_is_named(name):
    ranges = torch.zeros(1, 1, 1, dtype=torch.int32)
    given = {"q": torch.zeros(1, 2, 16), "k": torch.zeros(1, 1, 4, 16),
             "v": torch.zeros(1, 1, 4, 16), "starts": ranges, "lengths": ranges}  # fmt: skip
    with pytest.raises(TypeError, match=f"{name} must be a tensor; got NoneType"):
        saap.attend_ranges(**{**given, name: None})


@pytest.mark.bad_input
def test_a_store_names_what_is_no_tensor():
    store, k = saap.kv.KVStore(None, FULL), torch.zeros(1, 2, 3, 16)
    with pytest.raises(TypeError, match="v must be a tensor; got list"):
        store.append(k, [], k)
    store.append(k, k, k)
    with pytest.raises(TypeError, match="q_rope must be a tensor; got NoneType"):
        store.attend(None, None)
