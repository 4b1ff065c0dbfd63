"""Inverted lists and ranges: every row once, budgets kept, order by score."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saap.index.lists import bucket_ranges, invert
from saap.kernels.routing import select_lists


def random_lists(seed, n=60, nlist=7, heads=2):
    generator = torch.Generator().manual_seed(seed)
    buckets = torch.randint(0, nlist, (1, heads, n), generator=generator, dtype=torch.int32)
    return buckets, invert(buckets, nlist)


def rows_of(starts, lengths):
    return [
        sorted(r for s, n in zip(a.tolist(), b.tolist(), strict=True) for r in range(s, s + n))
        for a, b in zip(starts.flatten(0, 1), lengths.flatten(0, 1), strict=True)
    ]


def test_rows_of_a_bucket_are_in_time_order():
    buckets, lists = random_lists(0)
    for head in range(2):
        for b in range(7):
            begin, end = lists.offsets[0, head, b : b + 2].tolist()
            rows = lists.order[0, head, begin:end]
            assert rows.tolist() == sorted(rows.tolist())
            assert (buckets[0, head, rows] == b).all()


def test_imbalance_of_equal_buckets_is_one():
    lists = invert(torch.arange(12, dtype=torch.int32)[None, None] % 4, 4)
    assert lists.imbalance().item() == pytest.approx(1.0)
    assert invert(torch.zeros(1, 1, 12, dtype=torch.int32), 4).imbalance().item() == 4.0


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), nprobe=st.integers(1, 7), heads=st.sampled_from([2, 4]))
def test_nprobe_visits_the_best_buckets(seed, nprobe, heads):
    buckets, lists = random_lists(seed)
    scores = torch.rand(3, heads, 7, generator=torch.Generator().manual_seed(seed))
    starts, lengths = bucket_ranges(scores, lists.offsets, nprobe=nprobe)
    visited = rows_of(starts, lengths)
    for i, rows in enumerate(visited):
        query, head = divmod(i, heads)
        kv = head * 2 // heads
        # Empty buckets are never chosen.
        own = scores[query, head].masked_fill(lists.sizes[0, kv] == 0, -torch.inf)
        best = own.topk(nprobe).indices
        tokens = lists.order[0, kv, rows]
        assert len(set(rows)) == len(rows)
        assert torch.isin(buckets[0, kv, tokens], best.int()).all()
        assert len(rows) == torch.isin(buckets[0, kv], best.int()).sum()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), budget=st.integers(0, 80), more=st.integers(1, 20))
def test_max_tokens_is_kept_and_grows(seed, budget, more):
    _, lists = random_lists(seed)
    scores = torch.rand(1, 2, 7, generator=torch.Generator().manual_seed(seed))
    small = rows_of(*bucket_ranges(scores, lists.offsets, max_tokens=budget))
    large = rows_of(*bucket_ranges(scores, lists.offsets, max_tokens=budget + more))
    for few, many in zip(small, large, strict=True):
        assert len(few) == min(budget, 60)
        assert set(few) <= set(many)


def test_a_cut_bucket_keeps_its_newest_rows():
    lists = invert(torch.zeros(1, 1, 10, dtype=torch.int32), 2)
    starts, lengths = bucket_ranges(torch.tensor([[[1.0, 0.0]]]), lists.offsets, max_tokens=3)
    assert rows_of(starts, lengths) == [[7, 8, 9]]


@pytest.mark.parametrize("nprobe", [0, 8, -1])
def test_nprobe_out_of_range(nprobe):
    _, lists = random_lists(0)
    with pytest.raises(ValueError, match=rf"nprobe must be in 1\.\.7; got {nprobe}"):
        bucket_ranges(torch.rand(1, 2, 7), lists.offsets, nprobe=nprobe)


@pytest.mark.parametrize("uneven", [False, True])
def test_a_few_lists_that_fill_the_budget_are_found_as_all_are(uneven):
    """The shortcut for lists of typical size, and where they are too small for it."""
    generator = torch.Generator().manual_seed(0)
    nlist, max_tokens = 2000, 120
    buckets = torch.randint(0, nlist, (1, 2, 40_000), generator=generator, dtype=torch.int32)
    if uneven:  # half of all in one list, so that typical is not typical
        buckets[..., ::2] = 7
        buckets[..., 2000:] = 7
    lists = invert(buckets, nlist)
    scores = torch.rand(3, 2, nlist, generator=generator)
    scores[..., 7] = -1.0
    starts, lengths = bucket_ranges(scores, lists.offsets, max_tokens=max_tokens)
    assert (lengths.sum(-1) == max_tokens).all()
    sizes = lists.sizes.expand(3, -1, -1)
    order = scores.masked_fill(sizes == 0, -torch.inf).argsort(-1, descending=True)
    rows = sizes.gather(-1, order).cumsum(-1)
    for query in range(3):
        for head in range(2):
            n = int((rows[query, head] < max_tokens).sum()) + 1
            ends = lists.offsets[0, head][order[query, head, :n].long() + 1]
            used = lengths[query, head] > 0
            assert (starts + lengths)[query, head][used].tolist() == ends.tolist()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    nprobe=st.none() | st.integers(1, 7),
    max_tokens=st.none() | st.integers(0, 80),
    top_p=st.none() | st.floats(0.01, 1.0),
    per_row=st.booleans(),
)
def test_rows_are_those_that_a_decode_step_visits(seed, nprobe, max_tokens, top_p, per_row):
    """`select_lists`, which the KV store uses and this package may not import."""
    if nprobe is max_tokens is top_p is None:
        nprobe = 3
    lists = random_lists(seed)[1]
    scores = torch.rand(3, 4, 7, generator=torch.Generator().manual_seed(seed))
    bounds = {"nprobe": nprobe, "max_tokens": max_tokens, "top_p": top_p, "per_row": per_row}
    expected = select_lists(scores, lists.offsets, impl="reference", **bounds)
    assert rows_of(*bucket_ranges(scores, lists.offsets, **bounds)) == rows_of(*expected)
