"""Choice of rows by coded keys of a paged cache on a GPU: scores, weights, the heaviest, ranges.

Nothing waits for the GPU and shapes depend on arguments alone, so that an engine can capture a
step in a CUDA graph; memory is that of a few requests at a time. On CPU tensors it runs in
Triton's interpreter, if `TRITON_INTERPRET=1` was set before triton was imported.
"""

import functools
from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from saap.kernels.backends.launches import Launch, launch_all
from saap.kernels.codes.triton_shared import (
    add_weights,
    as_ranges,
    digits_of_weights,
    heaviest,
    queries_in_bytes,
)

from . import triton_kernels as kernel
from .layout import PER_WORD, ZERO, PageCodes

INTERPRETED = not isinstance(kernel.score_pages, triton.JITFunction)
BLOCK = 256  # tokens that a program scores
MOST_TOGETHER = 4  # query heads that a program scores together
WORKSPACE = 256 << 20
"""Bytes for scores and weights; requests that need more together are done one after the other."""


def limit(tensor: Tensor, codes: PageCodes) -> str | None:
    """What of validated arguments this backend cannot do, or None."""
    if tensor.device.type != "cuda" and not INTERPRETED:
        return (
            f"impl 'triton' needs a CUDA device; got tensors on {tensor.device}: use one, or set "
            "TRITON_INTERPRET=1 before triton is imported"
        )
    if codes.words.device != tensor.device:
        return f"codes must be on {tensor.device}, as the rest; got {codes.words.device}"
    return None


def encode_rows(keys: Tensor, slots: Tensor, codes: PageCodes) -> None:
    launch_all([encoding(keys.contiguous(), slots.contiguous(), codes)], keys)


def encoding(keys: Tensor, slots: Tensor, codes: PageCodes) -> Launch:
    """The kernel of `encode_rows` with all its arguments."""
    words = codes.dim // PER_WORD
    return Launch(
        kernel.encode_keys, (len(slots), codes.kv_heads),
        {
            "keys": keys, "slots": slots, "words": codes.words, "scales": codes.scales,
            "kv_heads": codes.kv_heads, "N_WORDS": words, "WORDS": triton.next_power_of_2(words),
            "ROWS": codes.rows,
        },
        {"num_warps": 1},
    )  # fmt: skip


def select_rows(
    q: Tensor, codes: PageCodes, block_table: Tensor, seq_lens: Tensor, keep: Tensor,
    sinks: int, window: int, page_stride: int, most: int, out: tuple[Tensor, Tensor],
) -> None:  # fmt: skip
    each = max(1, WORKSPACE // (4 * max(1, most) * (q.shape[1] + codes.kv_heads)))
    for n in range(0, len(q), each):
        part = slice(n, n + each)
        work = launches(
            q[part], codes, block_table[part], seq_lens[part], keep[part], sinks, window,
            page_stride, most, tuple(t[part] for t in out),
        )  # fmt: skip
        launch_all(work, q)


def launches(
    q: Tensor, codes: PageCodes, block_table: Tensor, seq_lens: Tensor, keep: Tensor,
    sinks: int, window: int, page_stride: int, most: int, out: tuple[Tensor, Tensor],
) -> Iterator[Launch]:  # fmt: skip
    """The kernels of a choice with all their arguments, on memory that is made here."""
    n_requests, n_heads, dim = q.shape
    kv_heads, device = codes.kv_heads, q.device
    tasks, group = n_requests * kv_heads, n_heads // kv_heads
    heads, words = tasks * group, dim // PER_WORD

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, device=device, dtype=torch.float32)

    in_bytes, queries = queries_in_bytes(q.contiguous().view(heads, dim), _tables(dim, device))
    yield in_bytes
    scores, weights = floats(heads, most), floats(tasks, most)
    together = min(MOST_TOGETHER, triton.next_power_of_2(group))
    yield Launch(
        kernel.score_pages,
        (triton.cdiv(most, BLOCK), tasks, triton.cdiv(group, together)),
        {
            **{name: each[0] for name, each in queries.items()},
            "words": codes.words, "scales": codes.scales, "block_table": block_table,
            "seq_lens": seq_lens, "out": scores, "table_row": block_table.stride(0),
            "kv_heads": kv_heads, "group": group, "room": most, "N_WORDS": words,
            "ROWS": codes.rows, "BLOCK": BLOCK, "HEADS": together, "ASM": not INTERPRETED,
        },
        {"num_warps": 4},
    )  # fmt: skip
    in_use = seq_lens.repeat_interleave(kv_heads, output_size=tasks)
    wanted = keep.repeat_interleave(kv_heads, output_size=tasks)
    yield from add_weights(scores, in_use, weights, None)
    yield Launch(
        kernel.take_ends, (tasks,),
        {
            "weights": weights, "in_use": in_use, "room": most, "sinks": sinks, "window": window,
            "BLOCK": 128,
        },
        {"num_warps": 4},
    )  # fmt: skip
    room = min(most, out[0].shape[2])
    rows, n_rows = ints(tasks, room), ints(tasks)
    digits = ints(digits_of_weights(tasks)).zero_()
    yield from heaviest(weights, in_use, digits, rows, n_rows, k=wanted)
    yield Launch(
        kernel.in_pool, (triton.cdiv(room, 1024), tasks),
        {
            "rows": rows, "n_rows": n_rows, "block_table": block_table,
            "table_row": block_table.stride(0), "kv_heads": kv_heads, "most": room,
            "page_stride": page_stride, "ROWS": codes.rows, "BLOCK": 1024,
        },
        {"num_warps": 4},
    )  # fmt: skip
    scored = torch.empty(tasks, dtype=torch.int64, device=device)
    yield as_ranges(rows, n_rows, out, scored, in_use, 0)


@functools.lru_cache(maxsize=64)
def _tables(dim: int, device: torch.device) -> Tensor:
    """float32 `[2, 2, D]`: steps and zeros of the one code there is, twice."""
    tables = torch.ones(2, 2, dim, device=device, dtype=torch.float32)
    tables[:, 1] = ZERO
    return tables
