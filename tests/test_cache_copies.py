"""Copies of a cache: each goes on by itself, over one model."""

import copy
import pickle

import pytest
import torch

import saap
from saap.budget import Budget
from saap.hf import over

from .test_generate import generated, make, prompt, random_index

SMALL = Budget(max_tokens=24, n_sink=4, window=8, flush_every=8)


@pytest.mark.parametrize(
    ("family", "method"), [("llama", "blend"), ("gemma3", "saap"), ("llama", "quest")]
)
def test_copies_of_a_cache_go_on_by_themselves(family, method):
    model = make(family)
    index = random_index(model) if method == "blend" else None
    first = {"input_ids": prompt(1, 60)}
    with saap.attached(model, index, SMALL, method=method) as saap_model:
        cache = saap_model.cache()
        answer = generated(model, first, max_new_tokens=6, **over(cache))
        held = cache.lengths
        asked = {"input_ids": torch.cat([answer, prompt(1, 7, seed=3)], 1)}
        twins = [copy.deepcopy(cache), copy.deepcopy(cache)]
        assert all(twin.owner is saap_model for twin in twins)
        found = [generated(model, asked, max_new_tokens=12, **over(twin)) for twin in twins]
        assert cache.lengths == held
        assert twins[0].lengths != held
        found.append(generated(model, asked, max_new_tokens=12, **over(cache)))
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


def test_a_cache_is_not_pickled():
    model = make("llama")
    with (
        saap.attached(model, random_index(model), SMALL, method="blend") as saap_model,
        pytest.raises(TypeError, match="save_context"),
    ):
        pickle.dumps(saap_model.cache())
