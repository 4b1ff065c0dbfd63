"""Needles: which single rows matter, and whether a method visits them."""

import pytest
import torch

from saap.eval.tasks import needle_rows
from saap.eval.tasks.needle_rows import LEAST, Needles

N, N_KV, OF_KV, DIM, ROWS = 5, 2, 3, 8, 60
FIRST, STOP = 4, 50


@pytest.fixture
def case():
    """Peaked attention, and what it is, with capped scores."""
    generator = torch.Generator().manual_seed(3)
    q = 3 * torch.randn(N, N_KV * OF_KV, DIM, generator=generator)
    k = torch.randn(N_KV, ROWS, DIM, generator=generator)
    scores = torch.einsum("nhgd,hrd->nhgr", q.unflatten(1, (N_KV, OF_KV)), k).flatten(1, 2)
    scores = 6 * torch.tanh(scores * 0.5 / 6)
    found = Needles.of(
        q, k, scores.logsumexp(-1), first=FIRST, stop=STOP, sm_scale=0.5, softcap=6.0
    )
    return found, scores.softmax(-1)


def test_needles_are_the_heavy_rows_of_the_middle(case):
    found, weights = case
    expected = [
        (i, h, row)
        for i in range(N)
        for h in range(N_KV * OF_KV)
        for row in range(FIRST, STOP)
        if weights[i, h, row] >= LEAST
    ]
    named = zip(found.query.tolist(), found.head.tolist(), found.token.tolist(), strict=True)
    assert sorted(named) == expected
    assert len(expected) > 50
    torch.testing.assert_close(found.weight, weights[found.query, found.head, found.token])
    heavy = torch.where(weights >= LEAST, weights, 0.0)[..., FIRST:STOP]
    torch.testing.assert_close(found.mass, heavy.sum((0, 2)))


@pytest.mark.parametrize("at_once", [1, 1 << 22])
@pytest.mark.parametrize("n_choosers", [N_KV, N_KV * OF_KV])
def test_lost_is_what_no_range_visits(case, n_choosers, at_once, monkeypatch):
    """Rows lie in another order than tokens, as partitions sort them; each KV head or each query
    head has ranges of its own."""
    monkeypatch.setattr(needle_rows, "AT_ONCE", at_once)
    found, _ = case
    generator = torch.Generator().manual_seed(5)
    tokens = torch.stack([torch.randperm(ROWS, generator=generator) for _ in range(N_KV)]).int()
    starts = torch.randint(ROWS, (N, n_choosers, 4), generator=generator).int()
    lengths = torch.randint(8, (N, n_choosers, 4), generator=generator).int()
    lost = torch.zeros(N_KV * OF_KV)
    for i, h, token, weight in zip(
        found.query, found.head, found.token, found.weight, strict=True
    ):
        own = h * n_choosers // (N_KV * OF_KV)
        visited = {
            int(tokens[h // OF_KV, row])
            for start, n in zip(starts[i, own].tolist(), lengths[i, own].tolist(), strict=True)
            for row in range(start, min(start + n, ROWS))
        }
        lost[h] += 0.0 if int(token) in visited else weight
    assert 0 < lost.sum() < found.mass.sum()
    torch.testing.assert_close(found.lost(tokens, starts, lengths), lost)


def test_without_a_range_all_are_lost_and_with_all_rows_none(case):
    found, _ = case
    tokens = torch.arange(ROWS).int().expand(N_KV, -1)
    none = torch.zeros(N, N_KV, 0, dtype=torch.int32)
    torch.testing.assert_close(found.lost(tokens, none, none), found.mass)
    starts = torch.full((N, N_KV, 1), FIRST, dtype=torch.int32)
    assert found.lost(tokens, starts, torch.full_like(starts, STOP - FIRST)).sum() == 0
