"""What tests of the choice by codes share."""

import torch

from saap.kernels.codes import QueryMap


def whole_numbers(batch, maps, n_kv, group, dim, coordinates, seed=0, dtype=torch.int16):
    """Queries `[batch, Hq, dim]` and a map of them, with which sums are exact in any order."""
    draw = torch.Generator().manual_seed(seed)
    q = torch.randint(-20, 21, (batch, n_kv * group, dim), generator=draw).float()
    shape = (maps, n_kv, dim, coordinates)
    most = min(999, torch.iinfo(dtype).max)
    weights = torch.randint(-most, most + 1, shape, generator=draw, dtype=dtype)
    powers = torch.randint(-16, -13, (maps, n_kv, coordinates), generator=draw)
    return q, QueryMap(weights, 2.0**powers)


def rows(ranges, i, h):
    """The rows of query i and head h, in the order of its ranges."""
    pairs = zip(ranges[0][i, h].tolist(), ranges[1][i, h].tolist(), strict=True)
    return [row for start, length in pairs for row in range(start, start + length)]
