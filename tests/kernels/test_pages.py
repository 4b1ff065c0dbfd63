"""Choice of pages: the plain form and the compiled one choose alike."""

import pytest
import torch

from saap.kernels.pages import select_pages


def case(lens, n_kv=2, group=3, dim=64, page=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    pages = [-(-n // page) for n in lens]
    keys = torch.randn(sum(pages) + 3, n_kv, dim, page, generator=g)
    table = torch.zeros(len(lens), max(pages), dtype=torch.int32)
    free = torch.randperm(len(keys), generator=g).int()
    for r, n in enumerate(pages):
        table[r, :n], free = free[:n], free[n:]
    q = torch.randn(len(lens), n_kv * group, dim, generator=g)
    return q, keys, table, torch.tensor(lens, dtype=torch.int32)


def chosen(impl, case, counts, **options):
    q, keys, table, lens = case
    out = torch.full((len(q), keys.shape[1], max(counts)), -1, dtype=torch.int32)
    counts = torch.tensor(counts, dtype=torch.int32)
    options = {"sm_scale": 0.2, "sink_pages": 1, "window_pages": 2} | options
    select_pages(q, keys, table, lens, counts, out=out, impl=impl, **options)
    return out


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("page", [16, 32])
def test_both_choose_the_same(group, page):
    own = case([700, 33, 1, 512], group=group, page=page)
    counts = [8, 2, 1, 16]
    assert torch.equal(chosen("reference", own, counts), chosen("numba", own, counts))


def test_all_pages_are_the_block_table():
    own = case([100, 64])
    found = chosen("numba", own, [4, 2])
    for r, n in enumerate((4, 2)):
        for h in range(2):
            assert found[r, h, :n].tolist() == (own[2][r, :n] * 2 + h).tolist()


def test_the_page_of_a_needle_is_found():
    q, keys, table, lens = case([640], group=1)
    for h in range(2):
        keys[table[0, 7], h, :, 5] = 5 * q[0, h]
    found = chosen("numba", (q, keys, table, lens), [4])
    for h in range(2):
        assert int(table[0, 7]) * 2 + h in found[0, h].tolist()
        assert found[0, h, -1] == table[0, 19] * 2 + h


@pytest.mark.parametrize("counts", [[0], [21]])
def test_counts_outside_the_pages_are_refused(counts):
    with pytest.raises(ValueError, match="counts must be at least 1"):
        chosen("numba", case([640]), counts)
