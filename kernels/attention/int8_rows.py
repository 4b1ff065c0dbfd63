"""Keys and values in eight bits each: the numbers of a row, then what they are multiples of.

A row of D numbers is `D + 4` bytes of int8: `round(x / scale)` of each, then `scale`, a float32,
which is the row's largest magnitude over 127. So a number is off by at most half of `scale`,
whatever other rows hold, and a row can be moved, saved and read on its own. A row with a number
that is not finite is NaN as a whole.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int8, Shaped
from torch import Tensor

from saap.kernels.backends import installed

Impl = Literal["reference", "numba"]

SCALE_BYTES = 4
LARGEST = 127


def quantize_rows(
    rows: Float[Tensor, "... D"], *, impl: Impl | None = None
) -> Int8[Tensor, "... D+4"]:
    """Rows of any floating-point dtype, whose numbers a float32 can hold.

    `impl`: `"reference"`, `"numba"` (CPU), or None, the best that can do it; they give the same
    bits.
    """
    backend = _backend(impl, rows)
    shape = *rows.shape[:-1], width(rows.shape[-1], torch.int8)
    found = torch.empty(shape, dtype=torch.int8, device=rows.device)
    if found.numel():
        backend(rows.to(torch.float32), found)
    return found


def _backend(impl: str | None, rows: Tensor) -> Callable[[Tensor, Tensor], None]:
    if impl not in (None, "reference", "numba"):
        raise ValueError(f"impl must be None, 'reference' or 'numba'; got {impl!r}")
    on_cpu = rows.device.type == "cpu"
    if impl == "numba" and not on_cpu:
        raise ValueError(f"impl 'numba' needs the CPU; got rows on {rows.device}")
    if impl == "reference" or not (on_cpu and installed("numba")):
        return _by_torch
    from .numba_int8 import quantize_rows

    return quantize_rows


def _by_torch(numbers: Float[Tensor, "... D"], found: Int8[Tensor, "... D+4"]) -> None:
    largest = numbers.abs().amax(-1, keepdim=True)
    scale = largest / LARGEST
    units = (numbers / torch.where(scale > 0, scale, 1.0)).round().clamp(-LARGEST, LARGEST)
    found[..., :-SCALE_BYTES] = torch.where(largest.isfinite(), units, 0.0)
    scale = torch.where(largest.isfinite(), scale, torch.nan)
    found[..., -SCALE_BYTES:] = _copied(scale).view(torch.int8)


def dequantize_rows(
    rows: Int8[Tensor, "... D+4"], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "... D"]:
    """What rows that `quantize_rows` made stand for."""
    scale = _copied(rows[..., -SCALE_BYTES:]).view(torch.float32)
    return (rows[..., :-SCALE_BYTES] * scale).to(dtype)


def _copied(t: Tensor) -> Tensor:
    """Such that its bytes can be seen as another dtype, whatever its strides were."""
    return t.clone(memory_format=torch.contiguous_format)


def parts_of(
    rows: Int8[Tensor, "... D+4"],
) -> tuple[Int8[Tensor, "... D"], Float[Tensor, "..."]]:
    """Views of the numbers and of the scales. D is a multiple of 4, and rows begin at one."""
    return rows[..., :-SCALE_BYTES], rows[..., -SCALE_BYTES:].view(torch.float32)[..., 0]


def stored_as(
    rows: Float[Tensor, "... D"], dtype: torch.dtype | None
) -> Shaped[Tensor, "... width"]:
    """Rows as a store of this dtype holds them, None for their own: what `widened` reads."""
    if dtype in (None, rows.dtype):
        return rows
    return quantize_rows(rows) if dtype == torch.int8 else rows.to(dtype)


def widened(rows: Shaped[Tensor, "... width"], dtype: torch.dtype) -> Float[Tensor, "... D"]:
    """Rows as they are stored, float or int8, in a dtype to compute in."""
    return dequantize_rows(rows, dtype) if rows.dtype == torch.int8 else rows.to(dtype)


def width(dim: int, dtype: torch.dtype) -> int:
    """Elements of a stored row of `dim` numbers."""
    return dim + SCALE_BYTES if dtype == torch.int8 else dim


def head_dim(rows: Shaped[Tensor, "... width"]) -> int:
    """Numbers of a stored row."""
    return rows.shape[-1] - SCALE_BYTES if rows.dtype == torch.int8 else rows.shape[-1]
