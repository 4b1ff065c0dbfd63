"""Codes written row by row are those of `encode`, and nothing beside them is touched."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saap.kernels.codes import Codes, encode, encode_rows

CANARY = 0x5A


def empty(batch, n_kv, n, coordinates):
    shapes = Codes.shapes(batch, n_kv, coordinates, n).values()
    return Codes(*(torch.full(shape, CANARY, dtype=dtype) for shape, dtype in shapes))


def hostile(n_kv, n, coordinates, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_kv, n, coordinates, generator=generator)
    x *= 10.0 ** torch.randint(-3, 4, (n_kv, n, 1), generator=generator)
    for value in (0.0, torch.nan, torch.inf, -torch.inf, 1e30, -1e-38):
        at = torch.rand(x.shape, generator=generator) < 0.002
        x[at] = value
    x[:, :1] = 0.0
    return x, torch.rand(n_kv, coordinates, generator=generator) + 0.01


@pytest.mark.parametrize("impl", ["reference", "numba", None])
@settings(max_examples=30, deadline=None)
@given(
    n_kv=st.integers(1, 3), n=st.sampled_from([0, 1, 16, 255, 257, 700]),
    coordinates=st.sampled_from([64, 128, 256]), first=st.integers(0, 9),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_rows_are_coded_in_place(impl, n_kv, n, coordinates, first, seed):
    x, importance = hostile(n_kv, n, coordinates, seed)
    codes = empty(2, n_kv, first + n + 5, coordinates)
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


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 32)}, r"x and importance must be \[2, n, 64\]"),
        ({"importance": torch.zeros(1, 64)}, r"got \(2, 3, 64\) and \(1, 64\)"),
        ({"x": torch.zeros(2, 3, 64).double()}, "must be float32; got torch.float64"),
        ({"first": 8}, "rows must be in 0..10 of sequence 0..0; got 8 to 11"),
        ({"first": -1}, "got -1 to 2"),
        ({"sequence": 1}, "of sequence 1"),
        ({"impl": "triton"}, "impl must be None, 'reference' or 'numba'; got 'triton'"),
    ],
)
def test_bad_input(change, message):
    given = {
        "x": torch.zeros(2, 3, 64), "importance": torch.ones(2, 64),
        "codes": empty(1, 2, 10, 64), "sequence": 0, "first": 0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        encode_rows(**given | change)
