"""The FAISS index over a KV store: its own rows, searched by key."""

import pytest
import torch

from saap.budget import Budget
from saap.index import ivf_file
from saap.index.routers import CentroidRouter
from saap.kv import KVStore
from saap.methods.learned import RoutedSelector
from saap.methods.random import RandomSelector
from saap.routing import LayerRouting

HKV, HQ, DIM, NLIST = 2, 4, 16, 8


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def routing(n_segments=1):
    centroids = torch.nn.functional.normalize(random(HKV, NLIST, DIM, seed=9), dim=-1)
    return LayerRouting(
        centroids,
        CentroidRouter(centroids),
        n_segments,
        torch.ones(HKV, NLIST),
        0.9 ** torch.arange(DIM // 2),
        sm_scale=0.25,
    )


def filled(n=200, batch=1, n_segments=1, **budget):
    budget = Budget(**{"nprobe": 2, "n_sink": 4, "window": 8, "flush_every": 8, **budget})
    store = KVStore(RoutedSelector(routing(n_segments)), budget)
    store.append(*random(3, batch, HKV, n, DIM, seed=1))
    return store


@pytest.mark.parametrize("n_segments", [1, 4])
@pytest.mark.parametrize("sequence", [0, 1])
def test_with_all_lists_it_is_exact_top_k(n_segments, sequence):
    store = filled(batch=2, n_segments=n_segments)
    index = store.as_index(sequence)
    assert index.vectors.data_ptr() == store.k[sequence, 0, 4].data_ptr()  # no copy
    assert index.ntotal == store.middles[sequence]
    q, qd = random(2, 3, HQ, DIM, seed=5)
    scores, positions = index.search(q, 10, NLIST * n_segments, route_by=qd)
    n = index.ntotal
    for head in range(HQ):
        keys = store.k[sequence, head // 2, 4 : 4 + n]
        tokens = store.rows.tokens[sequence, head // 2, 4 : 4 + n]
        best = (q[:, head] @ keys.T).topk(10)
        assert torch.allclose(scores[:, head], best.values, atol=1e-5)
        assert torch.equal(positions[:, head], tokens[best.indices].long())


@pytest.mark.parametrize("share", ["head", "group"])
@pytest.mark.parametrize("n_segments", [1, 4])
def test_it_finds_among_the_rows_that_a_step_visits(share, n_segments):
    store = filled(n_segments=n_segments, share=share)
    index = store.as_index()
    q, qd = random(2, 1, HQ, DIM, seed=6)
    starts, lengths = store.select(q, qd)
    _, positions = index.search(q, 500, 2, route_by=qd, share=share)
    own = [t[0] for t in index.select(qd, nprobe=2, share=share)]
    for head in range(HQ):
        kv, at = head // 2, head if share == "head" else head // 2
        pairs = zip(starts[0, at].tolist(), lengths[0, at].tolist(), strict=True)
        rows = [r for s, n in pairs for r in range(s, s + n)]
        visited = set(store.rows.tokens[0, kv, rows].tolist())
        found = positions[0, head][positions[0, head] >= 0]
        assert 0 < len(found) < index.ntotal
        assert set(found.tolist()) <= visited
        middle = set(store.rows.tokens[0, kv, 4 : 4 + index.ntotal].tolist())
        assert set(found.tolist()) == visited & middle
        pairs = zip(own[0][at].tolist(), own[1][at].tolist(), strict=True)
        mine = [r for s, n in pairs for r in range(s, s + n)]
        assert set(index.positions[kv, mine].tolist()) == set(found.tolist())


def test_a_new_view_sees_what_was_appended_and_an_old_one_says_that_it_is_old():
    store = filled()
    before = store.as_index()
    q = random(1, HQ, DIM, seed=7)
    before.search(q, 3, NLIST)
    store.append(*random(3, 1, HKV, 60, DIM, seed=8))
    after = store.as_index()
    assert after.ntotal >= before.ntotal + 50
    _, positions = after.search(q, after.ntotal, NLIST)
    expected = torch.arange(4, 4 + after.ntotal)
    assert torch.equal(positions[0, 0].sort().values, expected)
    with pytest.raises(ValueError, match="must be made after its rows moved for the last time"):
        before.search(q, 3, NLIST)


def test_a_view_cannot_be_changed():
    index = filled().as_index()
    for call in (
        lambda: index.add(random(HKV, 1, DIM)),
        lambda: index.remove(torch.tensor([5])),
        lambda: index.truncate(3),
        lambda: index.refine(random(HKV, 9, DIM)),
        lambda: index.save("x"),
    ):
        with pytest.raises(ValueError, match="must not be changed or saved") as error:
            call()
        assert "\n" not in str(error.value)
    assert index.nbytes == 0


def test_what_has_no_lists_has_no_index():
    store = KVStore(None, Budget(nprobe=1))
    with pytest.raises(ValueError, match=r"must keep its rows in lists.*got no selector"):
        store.as_index()
    for wrong in (1, -1):
        with pytest.raises(ValueError, match=rf"sequence must be in 0\.\.0; got {wrong}"):
            filled().as_index(wrong)
    with pytest.raises(ValueError, match=r"a store must hold tokens .* got none"):
        KVStore(RoutedSelector(routing()), Budget(nprobe=1)).as_index()


def test_rows_that_moved_are_not_shown_by_an_older_view(tmp_path):
    store = filled()
    index = store.as_index()
    store.append(*random(3, 1, HKV, 20, DIM, seed=2))
    store.as_index()
    for ask in (
        lambda: index.vectors, lambda: index.positions, lambda: index.offsets, index.statistics,
        lambda: ivf_file.to_faiss(index, tmp_path / "x.faiss", 0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="call as_index again"):
            ask()
    assert not list(tmp_path.iterdir())


def test_a_view_of_a_random_choice_does_not_change_the_stores():
    found = []
    for looks in (False, True):
        selector = RandomSelector(routing().centroids, 0)
        store = KVStore(selector, Budget(nprobe=2, n_sink=4, window=8, flush_every=8))
        store.append(*random(3, 1, HKV, 200, DIM, seed=1))
        if looks:
            q = random(2, 1, HQ, DIM, seed=5)
            store.as_index().search(q[0], 3, 2, route_by=q[1])
        q = random(1, HQ, DIM, seed=6)
        found.append(store.select(q, q))
    assert all(map(torch.equal, *found))
