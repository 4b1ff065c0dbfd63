"""Decode steps that visit single rows of vLLM's cache, through kernels of our own.

Keys and values of a token lie side by side, `[pages, Hkv, rows, 2 D]` in whatever order; chosen
rows are read where they lie. Nothing here depends on values on the host, so vLLM may capture a
step in a CUDA graph: how many rows a request visits is found where its length is known.

Needs no vLLM.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saap.kernels.attention import attend_ranges
from saap.kernels.pages import PageCodes, select_rows

from .options import Options
from .rotations import rotation_on

ROUNDED = 1024
"""Tokens that a step makes room for are a multiple of this, so that few kernels are compiled."""


@dataclass
class RowPlan:
    """The first `requests` of a step decode sparsely; none has more than `most` tokens. `rest`:
    vLLM's metadata of the requests behind them, None if there are none."""

    requests: int
    most: int
    options: Options
    rest: object | None = None


def to_keep(units: Tensor, lens: Tensor, at_ends: int, options: Options) -> Tensor:
    """How many of `units [R]` rows or pages requests of `lens [R]` tokens visit, int32 `[R]`."""
    wanted = (units * options.visited).ceil().to(units.dtype).clamp(min=at_ends)
    return torch.where(lens <= options.dense_below, units, torch.minimum(wanted, units)).int()


def rows_to_keep(lens: Tensor, options: Options) -> Tensor:
    """How many rows requests of so many tokens visit, int32 `[R]`."""
    return to_keep(lens, lens, options.sinks + options.window, options)


def room_for_rows(options: Options, most: int) -> int:
    """The most rows that a request of at most so many tokens visits."""
    share = math.ceil(most * options.visited) + 1  # shares of a length are rounded in float32
    return min(most, max(options.dense_below, share, options.sinks + options.window))


def in_place(kv_cache: Tensor, requests: int) -> tuple[Tensor, Tensor, int]:
    """Keys and values as `[requests, Hkv, N, D]` views that all requests share, and how many rows
    are from one page to the next.

    kv_cache: `[pages, Hkv, rows, 2 D]`. Raises ValueError for strides that no such view has.
    """
    pages, heads, rows, both = kv_cache.shape
    page, head, row, one = kv_cache.stride()
    if one != 1 or row < both or page % row or page < row * rows:
        raise ValueError(
            "the KV cache must have keys and values of a token side by side and whole rows "
            f"between pages; got strides {kv_cache.stride()} of {list(kv_cache.shape)}"
        )
    dim, n = both // 2, (pages - 1) * (page // row) + rows
    shape, strides = (requests, heads, n, dim), (0, head, row, 1)
    k, v = (
        kv_cache.as_strided(shape, strides, kv_cache.storage_offset() + offset)
        for offset in (0, dim)
    )
    return k, v, page // row


def attend_rows(
    query: Tensor, kv_cache: Tensor, codes: PageCodes, block_table: Tensor, seq_lens: Tensor,
    output: Tensor, *, most: int, scale: float, options: Options,
) -> None:  # fmt: skip
    """Exact attention of `query [R, Hq, D]` over the rows that codes choose, into `output`.

    Args:
        kv_cache: `[pages, Hkv, rows, 2 D]`; codes: of its keys.
        block_table: int32 `[R, pages]`; seq_lens: int32 `[R]`, 0 for a place without a request.
        most: no request has more tokens.
        scale: factor of the scores.

    Raises:
        ValueError: a layout or a size that the kernels cannot do.
    """
    n, _, dim = query.shape
    most = min(-(-most // ROUNDED) * ROUNDED, block_table.shape[1] * codes.rows)
    k, v, page_stride = in_place(kv_cache, n)
    room = room_for_rows(options, most)
    out = torch.empty(2, n, codes.kv_heads, room, dtype=torch.int32, device=query.device)
    starts, lengths = select_rows(
        query.float() @ rotation_on(dim, scale, query.device), codes, block_table, seq_lens,
        rows_to_keep(seq_lens, options), sinks=options.sinks, window=options.window,
        page_stride=page_stride, most=most, out=tuple(out),
    )  # fmt: skip
    found, _ = attend_ranges(query, k, v, starts, lengths, sm_scale=scale)
    output.view(n, -1, dim).copy_(found)
