"""A step's rows in one call: the same bytes in the same places as PyTorch's operators write."""

import copy

import pytest
import torch

from saap.kernels.append import PreparedAppend
from saap.kernels.append.reference import append

CASES = [  # batch, heads, capacity, widths, places
    (1, 1, 5, (16, 16), [4]),
    (1, 3, 70, (64, 64), [0]),
    (2, 3, 70, (80, 80), [69, 69]),
    (3, 2, 33, (128, 64), [0, 32, 7]),
    (1, 8, 40, (20, 20), [13]),
]


def random(shape, dtype, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(-100, 100, shape, generator=rng).to(dtype)


def counters(batch, heads):
    """Tails of ranges: every other number of a larger tensor, and some on their own."""
    whole = torch.arange(batch * heads * 6, dtype=torch.int32).view(batch, heads, 6)
    own = torch.zeros(batch, heads, dtype=torch.int32)
    return whole, own, [whole[..., 1], own]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_as_with_operators(case, dtype, turned):
    batch, heads, capacity, widths, places = case
    buffers = [random((batch, heads, capacity, w), dtype, w) for w in widths]
    expected = [t.clone() for t in buffers]
    whole, own, counts = counters(batch, heads)
    _, other, also = counters(batch, heads)
    write = PreparedAppend(buffers, counts)
    for step in range(3):
        places = [max(0, p - step) for p in places]
        rows = [random((batch, heads, 1, w), dtype, 7 + step) for w in widths]
        if turned:  # as a projection leaves them
            rows = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in rows]
        write(rows, places)
        append(expected, also, rows, places)
    for found, true in zip(buffers, expected, strict=True):
        assert torch.equal(found, true)
    assert torch.equal(own, other)
    assert int(own[0, 0]) == 3
    before = torch.arange(whole.numel(), dtype=torch.int32).view(whole.shape)
    assert torch.equal((whole - before).sum(-1), own)
    assert torch.equal(whole[..., 1] - before[..., 1], own)


def test_rows_that_lie_apart_and_other_dtypes_are_written_as_well():
    buffers = [torch.zeros(1, 2, 9, 16) for _ in range(2)]
    write = PreparedAppend(buffers, [])
    apart = torch.randn(1, 2, 1, 32)[..., ::2]
    wide = torch.randn(1, 2, 1, 16, dtype=torch.float64)
    negative = torch._neg_view(torch.randn(1, 2, 1, 16))
    assert negative.is_neg()
    for place, rows in enumerate([(apart, apart), (wide, wide), (negative, negative.clone())]):
        write(rows, [place])
        for buffer, new in zip(buffers, rows, strict=True):
            assert torch.equal(buffer[:, :, place], new[:, :, 0].float())


def test_a_buffer_whose_rows_are_farther_apart_than_they_are_wide():
    whole = torch.zeros(1, 2, 9, 24)
    write = PreparedAppend([whole[..., :16]], [])
    write([torch.ones(1, 2, 1, 16)], [8])
    assert float(whole.sum()) == 32
    assert bool((whole[:, :, 8, :16] == 1).all())


def test_nothing_else_is_copied():
    assert copy.deepcopy(PreparedAppend([torch.zeros(1, 1, 2, 16)], [])) is None


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("buffers", "counts", "message"),
    [
        ([torch.zeros(2, 3, 4)], [], r"buffers must be \[B, H, capacity, width\].*\(2, 3, 4\)"),
        ([torch.zeros(1, 1, 4, 8).mT], [], "a row's elements beside each other"),
        ([torch.zeros(1, 1, 4, 8), torch.zeros(1, 2, 4, 8)], [], "alike but for the width"),
        ([torch.zeros(1, 1, 4, 8)], [torch.zeros(1, 1)], "counts must be int32 .*float32"),
        (
            [torch.zeros(1, 1, 4, 8)],
            [torch.zeros(1, dtype=torch.int32)],
            r"got torch.int32 \(1,\)",
        ),
    ],
)
def test_bad_tensors(buffers, counts, message):
    with pytest.raises(ValueError, match=message):
        PreparedAppend(buffers, counts)
