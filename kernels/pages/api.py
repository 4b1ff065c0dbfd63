"""Public choice of pages by coded keys: validates, chooses a backend, never falls back from an
explicit one."""

from types import ModuleType
from typing import Literal

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from saap.kernels.backends import chosen

from .layout import PageCodes

Impl = Literal["reference", "numba"]
BACKENDS = ("reference", "numba")


def encode_rows(
    keys: Float[Tensor, "T Hkv D"],
    slots: Int64[Tensor, " T"],
    codes: PageCodes,
    *,
    impl: Impl | None = None,
) -> None:
    """Code keys into the rows that they are written to.

    Args:
        keys: `[T, Hkv, D]` float32, multiplied by `rotation(D)`. NaN and infinity count as 0.
        slots: int64 `[T]`, `page * rows + row` of each key; a negative one writes nothing.
        codes: is written to.
        impl: `"reference"`, `"numba"` (CPU), or None, the best that can do it.

    Raises:
        ValueError: an argument that does not fit, naming its value. A slot behind the last page
            is refused before anything is written.
    """
    _check_codes(codes)
    expected = (len(slots), codes.kv_heads, codes.dim)
    if tuple(keys.shape) != expected or keys.dtype != torch.float32:
        raise ValueError(
            f"keys must be float32 {list(expected)}; got {keys.dtype} {list(keys.shape)}"
        )
    if slots.ndim != 1 or slots.dtype != torch.int64:
        raise ValueError(f"slots must be int64 [T]; got {slots.dtype} {list(slots.shape)}")
    if len(slots) == 0:
        return
    if int(slots.max()) >= codes.pages * codes.rows:
        raise ValueError(f"slots must be below {codes.pages * codes.rows}; got {int(slots.max())}")
    _backend(impl, keys, codes).encode_rows(keys, slots, codes)


def select_pages(
    q: Float[Tensor, "R Hq D"],
    codes: PageCodes,
    block_table: Int32[Tensor, "R most"],
    seq_lens: Int32[Tensor, " R"],
    keep: Int32[Tensor, " R"],
    *,
    sink_pages: int,
    window_pages: int,
    out: Int32[Tensor, "RH kept"],
    impl: Impl | None = None,
) -> Int32[Tensor, "RH kept"]:
    """The pages with the most attention that their codes predict, for each request and KV head.

    Every row of a request is scored by its code. Each query head's scores become a softmax over
    the request; a page counts by the sum of its rows' weights over the query heads of a KV head.
    The first `sink_pages` and the last `window_pages` are always visited.

    Args:
        q: `[R, Hq, D]` float32, one query for each request, multiplied by `rotation(D)` and by
            the scale of the scores. `Hq` is a multiple of the codes' `Hkv`. A head with NaN or
            infinity finds all rows equal.
        codes: of all pages.
        block_table: int32 `[R, most]`, the pages of each request in order; contiguous rows.
        seq_lens: int32 `[R]`, tokens of each request, at least 1.
        keep: int32 `[R]`, pages to visit, those at both ends counted in; all if there are no more.
        sink_pages, window_pages: at least 0 and 1.
        out: int32 `[R * Hkv, kept]`, is written to: row `r * Hkv + h` gets the pages of request
            r and head h in order, each as `page * Hkv + h`; the rest of the row stays as it was.
        impl: `"reference"`, `"numba"` (CPU), or None, the best that can do it.

    Returns:
        `out`.

    Raises:
        ValueError: an argument that does not fit, naming its value.
    """
    _check_codes(codes)
    n = len(q) if q.ndim == 3 else -1
    if n < 0 or q.shape[2] != codes.dim or not q.shape[1] or q.shape[1] % codes.kv_heads:
        raise ValueError(
            f"q must be [R, a multiple of {codes.kv_heads}, {codes.dim}]; got {list(q.shape)}"
        )
    if q.dtype != torch.float32:
        raise ValueError(f"q must be float32; got {q.dtype}")
    for name, tensor, shape in (
        ("block_table", block_table, (n, block_table.shape[-1])),
        ("seq_lens", seq_lens, (n,)),
        ("keep", keep, (n,)),
        ("out", out, (n * codes.kv_heads, out.shape[-1])),
    ):
        if tuple(tensor.shape) != shape or tensor.dtype != torch.int32:
            raise ValueError(
                f"{name} must be int32 {list(shape)}; got {tensor.dtype} {list(tensor.shape)}"
            )
        if tensor.numel() > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name} must be contiguous in its last dimension; got strides")
    if sink_pages < 0 or window_pages < 1:
        raise ValueError(
            "sink_pages must be at least 0 and window_pages at least 1; got "
            f"{sink_pages} and {window_pages}"
        )
    if n == 0:
        return out
    _check_pages(codes, block_table, seq_lens, keep, sink_pages + window_pages, out.shape[1])
    backend = _backend(impl, q, codes)
    return backend.select_pages(
        q, codes, block_table, seq_lens, keep, sink_pages, window_pages, out
    )


def _check_codes(codes: PageCodes) -> None:
    if codes.fault is not None:
        raise ValueError(codes.fault)


def _check_pages(codes, block_table, seq_lens, keep, ends: int, room: int) -> None:
    """Values that a kernel reads and writes by; block numbers are checked as they are read."""
    if seq_lens.device.type != "cpu":
        return
    most = block_table.shape[1] * codes.rows
    for n, kept in zip(seq_lens.tolist(), keep.tolist(), strict=True):
        if not 1 <= n <= most:
            raise ValueError(f"seq_lens must be in 1..{most}, as block_table has room; got {n}")
        pages = -(-n // codes.rows)
        if kept < min(ends, pages):
            raise ValueError(f"keep must be at least {min(ends, pages)}; got {kept}")
        if min(kept, pages) > room:
            raise ValueError(f"out must have room for {min(kept, pages)} pages; got {room}")


def _backend(impl: str | None, tensor: Tensor, codes: PageCodes) -> ModuleType:
    return chosen(
        __package__, BACKENDS, impl, "numba", lambda module: module.limit(tensor, codes)
    )  # fmt: skip
