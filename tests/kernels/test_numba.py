"""The CPU backend against the reference: ragged, empty, strided, every dtype; bit-equal runs."""

import pytest
import torch

from saap.kernels.attention import attend_dense, attend_ranges, merge_states, quantize_rows
from saap.kernels.attention.int8_rows import dequantize_rows

from ..torch_threads import torch_threads
from .budget import assert_within_budget


def make(batch, q_heads, kv_heads, dim, rows, n_ranges, dtype, *, per_head=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, q_heads, dim, generator=generator).to(dtype)
    k, v = torch.randn(2, batch, kv_heads, rows, dim, generator=generator).to(dtype)
    lists = q_heads if per_head else kv_heads
    cuts = torch.randint(0, rows, (batch, lists, 2 * n_ranges), generator=generator)
    cuts = cuts.sort(-1).values.int()
    starts = cuts[..., ::2].contiguous()
    return q, k, v, starts, (cuts[..., 1::2] - starts).contiguous()


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 4, 2, 64, 1001, 7), torch.float32),
        ((3, 8, 2, 128, 777, 20), torch.float32),
        ((2, 4, 4, 64, 333, 5), torch.bfloat16),
        ((1, 16, 1, 256, 501, 3), torch.float16),
        # More query rows than a vector has, up to whole blocks and not.
        ((1, 72, 2, 64, 1001, 7), torch.float32),
        ((2, 46, 2, 80, 333, 5), torch.float32),
        ((1, 34, 2, 256, 303, 4), torch.bfloat16),
        ((1, 38, 1, 48, 501, 3), torch.float16),
        ((1, 4, 2, 64, 1001, 7), torch.int8),
        ((3, 10, 2, 80, 777, 20), torch.int8),
        ((2, 6, 3, 128, 333, 5), torch.int8),
        ((1, 16, 1, 256, 501, 3), torch.int8),
        ((1, 46, 2, 80, 333, 5), torch.int8),
    ],
)
def test_against_float64(shape, dtype, softcap, per_head):
    narrow = dtype == torch.int8
    q, k, v, starts, lengths = make(*shape, torch.float32 if narrow else dtype, per_head=per_head)
    numbers = k, v
    if narrow:
        k, v = quantize_rows(k), quantize_rows(v)
        numbers = dequantize_rows(k), dequantize_rows(v)
    lengths[0, 0] = 0  # a row whose ranges are all empty
    result = attend_ranges(q, k, v, starts, lengths, softcap=softcap, impl="numba")
    assert_within_budget(
        result, (q, *numbers, starts, lengths), sm_scale=q.shape[-1] ** -0.5, softcap=softcap
    )
    again = attend_ranges(q, k, v, starts, lengths, softcap=softcap, impl="numba")
    assert torch.equal(result[0], again[0])
    assert torch.equal(result[1], again[1])


def test_one_store_for_many_queries_is_read_in_place():
    q, k, v, starts, lengths = make(8, 4, 2, 64, 300, 4, torch.float32)
    k, v = (t[:1].expand(8, -1, -1, -1) for t in (k, v))
    result = attend_ranges(q, k, v, starts, lengths, impl="numba")
    assert_within_budget(result, (q, k, v, starts, lengths), sm_scale=64**-0.5)


def test_nan_in_rows_that_no_range_selects():
    q, k, v, _, _ = make(1, 4, 2, 64, 100, 2, torch.float32)
    starts = torch.tensor([[[0, 60]]] * 1).expand(1, 2, 2).int().contiguous()
    lengths = torch.tensor([[[20, 30]]]).expand(1, 2, 2).int().contiguous()
    clean = attend_ranges(q, k, v, starts, lengths, impl="numba")
    k[:, :, 20:60], v[:, :, 90:] = torch.nan, torch.inf
    dirty = attend_ranges(q, k, v, starts, lengths, impl="numba")
    assert torch.equal(clean[0], dirty[0])


DTYPES = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("q_heads", "dtype", "softcap"),
    [(40, torch.float32, None), *[(4, dtype, cap) for dtype in DTYPES for cap in (None, 20.0)]],
)
@pytest.mark.parametrize("rows", [20, 3072])  # one piece of work, and many that are merged
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("at", ["first", "last", "second half", "all"])
def test_nan_that_is_selected_comes_out(q_heads, dtype, softcap, rows, where, at):
    q, k, v, _, _ = make(2, q_heads, 2, 64, rows, 1, dtype)
    half = slice(32 if where == "q" else rows // 2, None)  # whole pieces of work, not the first
    place = {"first": slice(1), "last": slice(-1, None), "second half": half}.get(at, slice(None))
    if where == "q":
        q[0, 1, place] = torch.nan
    else:
        {"k": k, "v": v}[where][0, 1, place, 5] = torch.nan
    starts = torch.zeros(2, 2, 1, dtype=torch.int32)
    arguments = (q, k, v, starts, torch.full_like(starts, rows))
    expected = attend_ranges(*arguments, softcap=softcap, impl="reference")
    found = attend_ranges(*arguments, softcap=softcap, impl="numba")
    for got, true in zip(found, expected, strict=True):
        assert torch.equal(got.isnan(), true.isnan())
        assert not got.isinf().any()
        torch.testing.assert_close(got, true, rtol=1e-2, atol=1e-2, equal_nan=True)
    assert found[0].isnan().any()


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("rows", [20, 3072])
@pytest.mark.parametrize("beside", [0.0, torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize(("q_heads", "heads"), [(4, 2), (4, 4), (40, 2)])
def test_the_lse_of_infinite_scores_is_that_of_torch(softcap, rows, beside, q_heads, heads):
    q, k, v, _, _ = make(2, q_heads, 2, 64, rows, 1, torch.float32)
    k[1, 1, rows // 2, 3], k[1, 1, -1, 3] = torch.inf, beside
    starts = torch.tensor([0, rows // 2]).int().expand(2, heads, 2)
    lengths = torch.tensor([3, rows - rows // 2]).int().expand(2, heads, 2)
    options = {"softcap": softcap}
    expected = attend_ranges(q, k, v, starts, lengths, impl="reference", **options)
    found = attend_ranges(q, k, v, starts, lengths, impl="numba", **options)
    for got, true in zip(found, expected, strict=True):
        torch.testing.assert_close(got, true, equal_nan=True)
    if softcap is None and beside == 0.0:
        assert found[1].isposinf().any()


def test_infinite_states_are_merged_as_torch_adds_them():
    lse = torch.tensor([1.0, torch.inf, torch.inf, -torch.inf, torch.nan])
    other = torch.tensor([torch.inf, torch.inf, -torch.inf, -torch.inf, torch.inf])
    _, found = merge_states(torch.ones(5, 4), lse, torch.ones(5, 4), other)
    torch.testing.assert_close(found, torch.logaddexp(lse, other), equal_nan=True)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_sign_still_to_be_changed_is_changed(name):
    given = dict(zip(("q", "k", "v", "starts", "lengths"),
                     make(1, 4, 2, 64, 100, 3, torch.float32), strict=True))  # fmt: skip
    expected = attend_ranges(**given, impl="numba")
    found = attend_ranges(**given | {name: torch._neg_view(-given[name])}, impl="numba")
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_what_it_cannot_do_is_named():
    q, k, v, starts, lengths = make(1, 4, 2, 64, 50, 2, torch.float64)
    with pytest.raises(ValueError, match="float32, bfloat16 or float16 for impl 'numba'"):
        attend_ranges(q, k, v, starts, lengths, impl="numba")
    # None takes what can do it.
    assert attend_ranges(q, k, v, starts, lengths)[0].dtype == torch.float64


@pytest.mark.parametrize("heads", [4, 20])
def test_rounding_does_not_grow_with_every_row(heads):
    """Rows are summed up tile by tile: one by one, 100,000 of them lose 107 times eps, so 17."""
    generator = torch.Generator().manual_seed(0)
    n, dim = 100_000, 64
    q = torch.randn(1, heads, dim, generator=generator)
    k = torch.randn(1, 1, n, dim, generator=generator) * 0.3
    v = torch.randn(1, 1, n, dim, generator=generator) + 2
    with torch_threads(1):  # several have a part of the rows each, which rounds less
        out, _ = attend_dense(q, k, v, torch.tensor([n], dtype=torch.int32), impl="numba")
    scores = (q.double()[:, :, None] * k.double()).sum(-1) * dim**-0.5
    true = (scores.softmax(-1)[..., None] * v.double()).sum(2)
    error = float((out - true).abs().max() / true.abs().max())
    assert error < 50 * torch.finfo(torch.float32).eps
