"""A head that looks at the first tokens has little to say about which rows its group visits."""

import dataclasses

import pytest
import torch

from saap.budget import Budget
from saap.kv import KVStore
from saap.methods import find_method
from saap.methods.pq import PQBuild
from saap.selector import LayerInfo

N, DIM, N_SINK, N_BEST = 900, 64, 4, 20
LAYER = LayerInfo(DIM**-0.5)
BUDGET = Budget(max_tokens=N_BEST, n_sink=N_SINK, window=16, estimate_rest=False)
METHODS = {"saap": {}, "oracle-tokens": {}, "pq": {"build": PQBuild(dims=2)}}


def context(batch=1):
    """Keys, and queries of two heads that share them. The second looks at `best` rows of the
    middle. The first would look at as many others, as firmly, but for the sinks."""
    generator = torch.Generator().manual_seed(0)
    k = 0.3 * torch.randn(batch, 1, N, DIM, generator=generator)
    rows = torch.randperm(N - 100, generator=generator)[: 2 * N_BEST] + 50
    others, best = rows[:N_BEST], rows[N_BEST:].sort().values
    k[..., 0:3] *= 0.1
    k[:, :, :N_SINK, 0] = 12
    k[:, :, others, 1] = 5
    k[:, :, best, 2] = 5
    q = torch.zeros(batch, 2, 1, DIM)
    q[:, 0, :, :2] = 8
    q[:, 1, :, 2] = 8
    seen = 0.1 * torch.randn(batch, 2, 600, DIM, generator=generator)
    return k, q, seen + q, best


def store_of(name, layer, budget, k, seen):
    method = find_method(name)(**METHODS[name])
    store = KVStore(method.selector(layer), budget)
    store.append(k, k, k)
    store.selector.observe(seen, [seen.shape[2]] * len(seen))
    return store


def visited(store, q, **options):
    """Rows of the middle that a step visits, of each sequence and selection."""
    starts, lengths = (t[..., 2:, None] for t in store.select(q[:, :, 0], q[:, :, 0], **options))
    row = torch.arange(store.length)
    return [
        own.nonzero()[:, 0]
        for own in ((row >= starts) & (row < starts + lengths)).any(2).flatten(0, 1)
    ]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_rows_of_the_head_that_looks_at_the_middle(name, batch):
    k, q, seen, best = context(batch)
    for own in visited(store_of(name, LAYER, BUDGET, k, seen), q):
        assert torch.equal(own, best)
    k[:, :, :N_SINK, 0] = 0  # both look at the middle
    for own in visited(store_of(name, LAYER, BUDGET, k, seen), q):
        assert N_BEST // 4 < int(torch.isin(own, best).sum()) < 3 * N_BEST // 4


@pytest.mark.parametrize("name", METHODS)
def test_a_selection_of_each_head_is_its_own(name):
    k, q, seen, best = context()
    of_heads = dataclasses.replace(BUDGET, share="head")
    first, second = visited(store_of(name, LAYER, of_heads, k, seen), q)
    assert torch.equal(second, best)
    assert not torch.isin(first, best).any()


@pytest.mark.parametrize("name", METHODS)
def test_learned_sinks_take_their_share(name):
    k, q, seen, best = context()
    k[:, :, :N_SINK, 0] = 0
    layer = dataclasses.replace(LAYER, sinks=torch.tensor([16.0, -16.0]))
    assert torch.equal(visited(store_of(name, layer, BUDGET, k, seen), q)[0], best)


@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
def test_steps_weigh_heads_as_they_are_asked(kv_dtype):
    """Tokens come that take the place of the sinks, and every step sees them."""
    k, q, seen, best = context()
    k[:, :, :N_SINK, 0] = 0
    budget = dataclasses.replace(BUDGET, flush_every=64)
    store = KVStore(find_method("saap")().selector(LAYER), budget, kv_dtype=kv_dtype)
    store.append(k, k, k)
    store.selector.observe(seen, [seen.shape[2]])
    token, found = torch.zeros(1, 1, 1, DIM), []
    for i in range(20):
        token[..., 0] = 12 if i >= 10 else 0
        store.step(token, token, token, q, q)
        starts, lengths = (t[..., None] for t in store._steps.ranges.room.taken)
        row = torch.arange(store.length)
        own = ((row >= starts) & (row < starts + lengths)).any(2)[0, 0]
        found.append(int(own[best].sum()))
    assert max(found[:10]) < 3 * N_BEST // 4
    assert min(found[10:]) == N_BEST


def test_what_is_beside_the_middle_can_be_given():
    k, q, seen, best = context()
    k[:, :, :N_SINK, 0] = 0
    store = store_of("saap", LAYER, BUDGET, k, seen)
    given = torch.tensor([[16.0, -16.0]])
    assert torch.equal(visited(store, q, local_lse=given)[0], best)
