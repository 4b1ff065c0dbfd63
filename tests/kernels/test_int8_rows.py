"""Rows of eight bits a number, each with its scale."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saap.kernels.attention import attend_ranges, dequantize_rows, quantize_rows
from saap.kernels.attention.int8_rows import head_dim, parts_of, widened, width

DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64


@given(
    seed=st.integers(0, 2**20), dim=st.sampled_from((1, 7, 16, 64, 80)),
    power=st.integers(-60, 38), dtype=st.sampled_from(DTYPES), spread=st.booleans(),
)  # fmt: skip
def test_a_number_is_off_by_half_of_its_row_s_unit(seed, dim, power, dtype, spread):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 2, 5, dim, generator=generator, dtype=torch.float64) * 10.0 ** (power / 2)
    if spread:  # rows of different sizes, and numbers that are much larger than others
        x = x * torch.randn(3, 2, 5, dim, generator=generator, dtype=torch.float64).exp() ** 3
    x = x.to(dtype)
    x = x[x.isfinite().all(-1)]
    rows = quantize_rows(x, impl="reference")
    assert torch.equal(quantize_rows(x), rows)
    assert torch.equal(quantize_rows(x.mT.contiguous().mT), rows)
    assert rows.shape == (*x.shape[:-1], dim + 4)
    assert (width(dim, torch.int8), head_dim(rows)) == (dim + 4, dim)
    found = dequantize_rows(rows, torch.float64)
    unit = x.double().abs().amax(-1, keepdim=True) / 127
    assert ((found - x.double()).abs() <= unit * (0.5 + 1e-5) + 1e-40).all()
    again = dequantize_rows(quantize_rows(found), torch.float64)
    assert ((again - found).abs() <= unit * 1e-4 + 1e-40).all()


def test_zeros_and_what_is_not_finite():
    x = torch.randn(6, 16)
    x[0], x[1, 3], x[2, 5], x[3, 7], x[4] = 0.0, torch.nan, torch.inf, -torch.inf, 1e-44
    rows = quantize_rows(x, impl="numba")
    found = dequantize_rows(rows)
    plain = quantize_rows(x, impl="reference")
    assert torch.equal(dequantize_rows(plain).nan_to_num(7.0), found.nan_to_num(7.0))
    assert (found[0] == 0).all()
    assert found[1:4].isnan().all()
    assert found[4:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_widened_is_what_rows_stand_for(dtype):
    x = torch.randn(2, 5, 32)
    rows = quantize_rows(x)
    assert torch.equal(widened(rows, dtype), dequantize_rows(rows, dtype))
    assert torch.equal(widened(x, dtype), x.to(dtype))
    numbers, scales = parts_of(rows)
    assert torch.equal(numbers * scales[..., None], dequantize_rows(rows))


@pytest.mark.parametrize("impl", ["reference", "numba"])
@pytest.mark.parametrize("heads", [4, 40])
def test_a_row_that_is_not_selected_does_not_count_and_a_nan_does(impl, heads):
    torch.manual_seed(0)
    q, (k, v) = torch.randn(1, heads, 64), torch.randn(2, 1, 2, 100, 64)
    starts = torch.tensor([[[0, 60]]]).expand(1, 2, 2).int().contiguous()
    lengths = torch.tensor([[[20, 30]]]).expand(1, 2, 2).int().contiguous()
    clean = attend_ranges(q, quantize_rows(k), quantize_rows(v), starts, lengths, impl=impl)
    k[:, :, 20:60], v[:, :, 90:] = torch.nan, torch.inf
    dirty = attend_ranges(q, quantize_rows(k), quantize_rows(v), starts, lengths, impl=impl)
    assert torch.equal(clean[0], dirty[0])
    k[:, 1, 61, 3] = torch.nan
    found = attend_ranges(q, quantize_rows(k), quantize_rows(v), starts, lengths, impl=impl)
    assert found[0][:, heads // 2 :].isnan().all()
    assert torch.equal(found[0][:, : heads // 2], clean[0][:, : heads // 2])


@pytest.mark.bad_input
def test_what_is_refused():
    q, k = torch.randn(1, 4, 64), torch.zeros(1, 2, 9, 64, dtype=torch.int8)
    starts = torch.zeros(1, 2, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"k must have .* D of q, 1 and 64, D \+ 4 = 68 in int8"):
        attend_ranges(q, k, k, starts, starts)
    with pytest.raises(ValueError, match="impl must be None, 'reference' or 'numba'; got 'faiss'"):
        quantize_rows(q, impl="faiss")
    with pytest.raises(ValueError, match=r"q must have dtype float32, .*; got torch\.int8"):
        attend_ranges(torch.zeros(1, 4, 60, dtype=torch.int8), k, k, starts, starts)
