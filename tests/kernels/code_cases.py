"""What tests of the choice by codes share."""

import torch

from saap.kernels.codes import Codes, QueryMap, encode, encode_rows


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


CANARY = 0x5A


def room_for(batch, n_kv, n, coordinates, device="cpu"):
    shapes = Codes.shapes(batch, n_kv, coordinates, n).values()
    return Codes(
        *(torch.full(shape, CANARY, dtype=dtype, device=device) for shape, dtype in shapes)
    )


def hostile_keys(n_kv, n, coordinates, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_kv, n, coordinates, generator=generator)
    x *= 10.0 ** torch.randint(-3, 4, (n_kv, n, 1), generator=generator)
    for value in (0.0, torch.nan, torch.inf, -torch.inf, 1e30, 1e15, -1e-38):
        at = torch.rand(x.shape, generator=generator) < 0.002
        x[at] = value
    x[:, :1] = 0.0
    x[:, -1:] = 0.0
    x[:, -1:, 3] = 2.0  # hardly anything of it can be coded
    return x, torch.rand(n_kv, coordinates, generator=generator) + 0.01


def check_coding(impl, n_kv, n, coordinates, first, seed, device="cpu"):
    """Codes written in place are those of `encode`, and nothing beside them is touched."""
    x, importance = (t.to(device) for t in hostile_keys(n_kv, n, coordinates, seed))
    codes = room_for(2, n_kv, first + n + 5, coordinates, device)
    encode_rows(x, importance, codes, 1, first, impl=impl)
    own = slice(first, first + n)
    expected = encode(x[None], importance[None])
    parts = (
        (codes.coarse[1, ..., own].mT, expected.coarse[0].mT),
        (codes.fine[1, :, own], expected.fine[0]),
        (codes.scale[1, :, own, None], expected.scale[0, ..., None]),
    )
    differ = [(found != true).any(-1) for found, true in parts]
    # A sum's last bit may decide how a coordinate or a scale is rounded.
    assert int(torch.stack(differ).any(0).sum()) <= 1 + n_kv * n // 500
    for tensor, rows in ((codes.coarse, -1), (codes.fine, 2), (codes.scale, 2)):
        assert (tensor[0] == CANARY).all()
        before, after = tensor.narrow(rows, 0, first)[1], tensor.narrow(rows, first + n, 5)[1]
        assert (before == CANARY).all()
        assert (after == CANARY).all()
