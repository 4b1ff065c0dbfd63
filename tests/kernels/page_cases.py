"""Paged caches of random keys, for the tests of choosing by codes."""

import torch

from saap.kernels.pages import PageCodes, encode_rows, rotation


def case(lens, n_kv=2, group=3, dim=64, rows=32, seed=0, impl="numba", device="cpu"):
    """Queries, codes of random keys that lie anywhere, block table, lengths, the keys."""
    g = torch.Generator().manual_seed(seed)
    pages = [-(-n // rows) for n in lens]
    total = sum(pages) + 3
    keys = torch.randn(total * rows, n_kv, dim, generator=g)
    codes = PageCodes.empty(total, n_kv, rows, dim, device)
    slots = torch.arange(total * rows, device=device)
    encode_rows((keys @ rotation(dim)).to(device), slots, codes, impl=impl)
    table = torch.zeros(len(lens), max(pages), dtype=torch.int32)
    free = torch.randperm(total, generator=g).int()
    for r, n in enumerate(pages):
        table[r, :n], free = free[:n], free[n:]
    q = torch.randn(len(lens), n_kv * group, dim, generator=g)
    lens = torch.tensor(lens, dtype=torch.int32)
    return q.to(device), codes, table.to(device), lens.to(device), keys


def rows_of(out, r, h):
    """The rows of a request and head that ranges hold, in their order."""
    pairs = zip(out[0][r, h].tolist(), out[1][r, h].tolist(), strict=True)
    return [row for start, length in pairs for row in range(start, start + length)]
