"""Device code of `triton`: keys to codes, codes to scores, and places of a request to rows."""

import triton
import triton.language as tl

from saap.kernels.codes.triton_kernels import dot4

from .layout import LARGEST, STEP, ZERO

_LARGEST, _STEP, _ZERO = tl.constexpr(float(LARGEST)), tl.constexpr(STEP), tl.constexpr(ZERO)
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: added and taken off, what is left is whole
_LOWER = tl.constexpr(0x0F0F0F0F)


@triton.jit
def encode_keys(
    keys, slots, words, scales, kv_heads, N_WORDS: tl.constexpr, WORDS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """One key of one KV head: `words [pages, Hkv, N_WORDS, ROWS]`, `scales [pages, Hkv, ROWS]`.

    keys: float32 `[T, Hkv, 8 * N_WORDS]`; slots: int64 `[T]`, a negative one writes nothing.
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    w, j = tl.arange(0, WORDS), tl.arange(0, 8)
    held = (w < N_WORDS)[:, None]
    x = tl.load(
        keys + (token * kv_heads + head) * (8 * N_WORDS) + w[:, None] * 8 + j[None, :],
        held, other=0.0,
    )  # fmt: skip
    x = tl.where(tl.abs(x) < float("inf"), x, 0.0)  # NaN is not below infinity, either
    square = tl.sum(tl.sum(x * x, 1), 0)
    length = tl.sqrt_rn(square / (8 * N_WORDS))
    step = tl.where(length > 0, _STEP * length, 1.0)
    code = tl.div_rn(x, step) + _ZERO + _ROUND
    code = tl.minimum(tl.maximum(code - _ROUND, 0.0), _LARGEST)
    match = tl.sum(tl.sum(tl.where(held, (code - _ZERO) * x, 0.0), 1), 0)
    scale = tl.where(match > 0, tl.div_rn(square, match), 0.0)
    shift = (j % 4) * 8 + (j // 4) * 4
    packed = tl.sum(code.to(tl.int32) << shift[None, :], 1)
    place = slot // ROWS * kv_heads + head
    tl.store(words + (place * N_WORDS + w) * ROWS + slot % ROWS, packed, w < N_WORDS)
    tl.store(scales + place * ROWS + slot % ROWS, scale)


@triton.jit
def score_pages(
    packed, offsets, factors, words, scales, block_table, seq_lens, out,
    table_row, kv_heads, group, room,
    N_WORDS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """`out[task, head, i]` = the score of token i of a request; a task is a request's KV head.

    packed, offsets, factors: of `query_bytes`; block_table: int32 `[R, most]`; seq_lens: int32
    `[R]`; out: float32 `[tasks, group, room]`, written where there are tokens.
    """
    task = tl.program_id(1).to(tl.int64)
    request, kv_head = task // kv_heads, task % kv_heads
    in_use = tl.load(seq_lens + request)
    if tl.program_id(0) * BLOCK >= in_use:
        return
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < in_use
    page = tl.load(block_table + request * table_row + i // ROWS, inside, other=0).to(tl.int64)
    place = page * kv_heads + kv_head
    first = words + place * (N_WORDS * ROWS) + i % ROWS
    h = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    known = h < group
    head = task * group + tl.where(known, h, 0)
    own = packed + head * (2 * N_WORDS)
    total = tl.zeros([HEADS, BLOCK], dtype=tl.int32)
    for w in tl.static_range(N_WORDS):
        word = tl.load(first + w * ROWS, inside, other=0)
        weight = tl.load(own + 2 * w)[:, None]
        total = dot4((word & _LOWER)[None, :], weight, total, ASM)
        weight = tl.load(own + 2 * w + 1)[:, None]
        total = dot4(((word >> 4) & _LOWER)[None, :], weight, total, ASM)
    scale = tl.load(scales + place * ROWS + i % ROWS, inside, other=0.0)
    score = total.to(tl.float32) - tl.load(offsets + head)[:, None]
    score = score * tl.load(factors + head)[:, None] * scale[None, :]
    tl.store(out + head[:, None] * room + i[None, :], score, known[:, None] & inside[None, :])


@triton.jit
def take_ends(weights, in_use, room, sinks, window, BLOCK: tl.constexpr):
    """Makes `weights [tasks, room]` of the first and of the newest tokens infinite."""
    task = tl.program_id(0).to(tl.int64)
    held = tl.load(in_use + task)
    for first in range(0, sinks + window, BLOCK):
        i = first + tl.arange(0, BLOCK)
        place = tl.where(i < sinks, i, held - (sinks + window) + i)
        known = (i < sinks + window) & (place >= 0) & (place < held)
        tl.store(weights + task * room + place, tl.full([BLOCK], float("inf"), tl.float32), known)


@triton.jit
def in_pool(
    rows, n_rows, block_table, table_row, kv_heads, most, page_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turns `rows [tasks, most]`, places within a request, into rows of the pool, in place."""
    task = tl.program_id(1).to(tl.int64)
    n = tl.load(n_rows + task)
    if tl.program_id(0) * BLOCK >= n:
        return
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + task * most + i, i < n, other=0)
    page = tl.load(block_table + task // kv_heads * table_row + row // ROWS, i < n, other=0)
    tl.store(rows + task * most + i, page * page_stride + row % ROWS, i < n)
