"""Scores of coded rows on a GPU: codes are unpacked in registers, multiplied in tensor cores."""

import triton
import triton.language as tl

from .layout import SCALE_BASE, SCALE_SHIFT

_SHIFT, _BASE = tl.constexpr(SCALE_SHIFT), tl.constexpr(SCALE_BASE)


@triton.jit
def _twos(words, j):
    """Sixteen codes of 2 bits of each word."""
    return (words[:, None] >> (j % 4 * 8 + j // 4 * 2)[None, :]) & 3


@triton.jit
def _bits(words, j, first):
    """Sixteen bits of each word: of the first half where `first` is 0, of the second where 4."""
    return (words[:, None] >> (j % 4 * 8 + j // 4 + first)[None, :]) & 1


@triton.jit
def score_codes(
    weights, offsets, factors, coarse, fine, scale, counts, listed, out,
    heads, kv_heads, by_sequence, n_listed, group,
    coarse_batch, coarse_head, coarse_plane, fine_batch, fine_head, scale_batch, scale_head,
    N_WORDS: tl.constexpr, WHOLE: tl.constexpr, LISTED: tl.constexpr,
    BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """`out[task, head, i]` = the score of row i, or of row `listed[task, i]`; -inf for no row.

    weights: float16 `[tasks, P, HEADS]`, queries in whole numbers; offsets, factors: float32
    `[tasks, HEADS]`; counts: int32, rows of each sequence; listed: int32, -1 for no row; out:
    float32 `[tasks, group, n_listed]`. Strides are in elements.
    """
    task = tl.program_id(1).to(tl.int64)
    b = task // heads * by_sequence
    kv_head = task % heads * kv_heads // heads
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    held = i < n_listed
    rows = i
    if LISTED:
        rows = tl.load(listed + task * n_listed + i, held, other=-1)
    inside = held & (rows >= 0) & (rows < tl.load(counts + b))
    rows = tl.where(inside, rows, 0).to(tl.int64)
    j = tl.arange(0, 16)
    h = tl.arange(0, HEADS)
    own = weights + task * (64 * N_WORDS * HEADS) + j[:, None] * HEADS + h[None, :]
    plane = coarse + b * coarse_batch + kv_head * coarse_head + rows
    words = fine + b * fine_batch + kv_head * fine_head + rows * (4 * N_WORDS)
    total = tl.zeros([BLOCK, HEADS], dtype=tl.float32)
    for w in tl.static_range(N_WORDS):
        first = tl.load(plane + w * coarse_plane, inside, other=0)
        signs = tl.load(plane + (N_WORDS + w) * coarse_plane, inside, other=0)
        code_0, code_1, code_2 = _twos(first, j), _bits(signs, j, 0), _bits(signs, j, 4)
        at = own + w * (16 * HEADS)
        if WHOLE:
            last = tl.load(words + 2 * N_WORDS + w, inside, other=0)
            code_0 = 4 * code_0 + _twos(tl.load(words + w, inside, other=0), j)
            middle = _twos(tl.load(words + N_WORDS + w, inside, other=0), j)
            code_1 = 8 * code_1 + 2 * middle + _bits(last, j, 0)
            code_2 = 2 * code_2 + _bits(last, j, 4)
            code_3 = _twos(tl.load(words + 3 * N_WORDS + w, inside, other=0), j)
            weight = tl.load(at + 3 * N_WORDS * 16 * HEADS)
            total = tl.dot(code_3.to(tl.float16), weight, total)
        total = tl.dot(code_0.to(tl.float16), tl.load(at), total)
        total = tl.dot(code_1.to(tl.float16), tl.load(at + N_WORDS * 16 * HEADS), total)
        total = tl.dot(code_2.to(tl.float16), tl.load(at + 2 * N_WORDS * 16 * HEADS), total)
    stored = tl.load(scale + b * scale_batch + kv_head * scale_head + rows, inside, other=0)
    scales = ((stored.to(tl.int32) << _SHIFT) + _BASE).to(tl.float32, bitcast=True)
    total -= tl.load(offsets + task * HEADS + h)[None, :]
    total *= tl.load(factors + task * HEADS + h)[None, :]
    score = tl.where(inside[:, None], total * scales[:, None], -float("inf"))
    place = out + (task * group + h[None, :]) * n_listed + i[:, None]
    tl.store(place, score, held[:, None] & (h < group)[None, :])
