"""Scores of coded rows on a GPU: four codes of a word times four bytes of a query at a time."""

import triton
import triton.language as tl

from .layout import QUERY_MAX, SCALE_BASE, SCALE_SHIFT

_SHIFT, _BASE = tl.constexpr(SCALE_SHIFT), tl.constexpr(SCALE_BASE)
_QUERY_MAX = tl.constexpr(float(QUERY_MAX))
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: added and taken off, what is left is whole
_ONES, _TWOS, _THREES = (tl.constexpr(n * 0x01010101) for n in (1, 3, 7))  # bits


@triton.jit
def map_queries(
    queries, weights, scale, out, heads, group, weights_batch, scale_batch, D,
    P: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`QueryMap` of a query head, `BLOCK` of its coordinates.

    queries: float32 `[tasks * group, D]`, of `heads` a sequence, `group` a KV head; weights: int8
    or int16 `[B, Hkv, D, P]`; scale: float32 `[B, Hkv, P]`; out: float32 `[tasks * group, P]`.
    """
    head = tl.program_id(0).to(tl.int64)
    b, kv_head = head // heads, head % heads // group
    p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    own = weights + b * weights_batch + kv_head * D * P
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, D, ROWS):
        d = first + tl.arange(0, ROWS)
        q = tl.load(queries + head * D + d, d < D, other=0.0)
        rows = tl.load(own + d[:, None] * P + p[None, :], (d < D)[:, None], other=0)
        total += tl.sum(q[:, None] * rows.to(tl.float32), 0)
    total *= tl.load(scale + b * scale_batch + kv_head * P + p)
    tl.store(out + head * P + p, total)


@triton.jit
def query_bytes(
    queries, tables, packed, offsets, factors, P: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Queries as whole numbers of a byte, four to an int32, for coarse codes (0) and whole (1).

    queries: float32 `[tasks * group, P]`; tables: float32 `[2, 2, P]`, steps and zeros of
    both codes; packed: int32 `[2, tasks * group, P / 4]`; offsets, factors: float32
    `[2, tasks * group]`, see `reference.in_bytes`.
    """
    head, total = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    i = tl.arange(0, WORDS)
    held = i < P // 4
    lane = tl.arange(0, 4)
    place = i[:, None] * 4 + lane[None, :]
    q = tl.load(queries + head * P + place, held[:, None], other=0.0)
    for code in tl.static_range(2):
        own = tables + code * 2 * P
        steps = tl.load(own + place, held[:, None], other=0.0)
        zeros = tl.load(own + P + place, held[:, None], other=0.0)
        scaled = q * steps
        largest = tl.max(tl.max(tl.abs(scaled), 1), 0)
        # A maximum may leave NaN out; a sum with zeros does not.
        odd = tl.sum(tl.sum(scaled * 0.0, 1), 0)
        usable = (largest > 0) & (largest < float("inf")) & (odd == 0.0)
        factor = tl.where(usable, tl.div_rn(largest, _QUERY_MAX), 1.0)
        whole = tl.where(usable, tl.div_rn(scaled, factor), 0.0) + _ROUND
        whole = whole - _ROUND
        offset = tl.sum(tl.sum(whole * zeros, 1), 0)
        number = (whole.to(tl.int32) & 255) << (lane * 8)[None, :]
        words = tl.sum(number, 1)
        tl.store(packed + (code * total + head) * (P // 4) + i, words, held)
        tl.store(offsets + code * total + head, offset)
        tl.store(factors + code * total + head, factor)


@triton.jit
def dot4(codes, weights, total, ASM: tl.constexpr):
    """`total` plus the product of four codes, below 128, with four signed bytes."""
    if ASM:
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [codes, weights, total],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    for place in tl.static_range(4):
        total += ((codes >> (8 * place)) & 255) * ((weights << (24 - 8 * place)) >> 24)
    return total


@triton.jit
def _add_coarse(word, own, total, N_WORDS: tl.constexpr, ASM: tl.constexpr):
    """Products with a coarse word; `own`: weights of its first coordinates (`layout.COARSE`)."""
    for four in tl.static_range(2):
        weight = tl.load(own + four)[:, None]
        total = dot4(((word >> (2 * four)) & _TWOS)[None, :], weight, total, ASM)
        weight = tl.load(own + 2 * N_WORDS + four)[:, None]
        total = dot4(((word >> (4 + four)) & _ONES)[None, :], weight, total, ASM)
        weight = tl.load(own + 4 * N_WORDS + four)[:, None]
        total = dot4(((word >> (6 + four)) & _ONES)[None, :], weight, total, ASM)
    return total


@triton.jit
def _add_fine(words, own, total, inside, N_WORDS: tl.constexpr, ASM: tl.constexpr):
    """Products with the fine words of the same coordinates, where these lie (`layout.FINE`)."""
    for plane in tl.static_range(5):
        word = tl.load(words + plane * N_WORDS, inside, other=0)
        for four in tl.static_range(2):
            weight = tl.load(own + plane * 2 * N_WORDS + four)[:, None]
            total = dot4(((word >> (3 * four)) & _THREES)[None, :], weight, total, ASM)
        if plane < 4:
            weight = tl.load(own + (5 + plane // 2) * 2 * N_WORDS + plane % 2)[:, None]
            total = dot4(((word >> 6) & _TWOS)[None, :], weight, total, ASM)
        else:
            for four in tl.static_range(2):
                weight = tl.load(own + 7 * 2 * N_WORDS + four)[:, None]
                total = dot4(((word >> (6 + four)) & _ONES)[None, :], weight, total, ASM)
    return total


@triton.jit
def score_codes(
    packed, offsets, factors, coarse, fine, scale, counts, listed, n_listed, out,
    heads, kv_heads, by_sequence, room, group,
    coarse_batch, coarse_head, coarse_plane, fine_batch, fine_head, scale_batch, scale_head,
    N_WORDS: tl.constexpr, WHOLE: tl.constexpr, LISTED: tl.constexpr,
    BLOCK: tl.constexpr, HEADS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """`out[task, head, i]` = the score of row i, or of row `listed[task, i]`; -inf for no row.

    packed, offsets, factors: of `query_bytes`, for whole or for coarse codes; counts: int32, rows
    of each sequence; listed: int32 `[tasks, room]` of which `n_listed [tasks]` are in use; out:
    `[tasks, group, room]`, written where there are rows: float32, or, of coarse codes, which a
    head compares with its own alone, int16: the score in units of its `factor`, about a hundredth
    of how far scores are apart. Strides are in elements.
    """
    task = tl.program_id(1).to(tl.int64)
    b = task // heads * by_sequence
    kv_head = task % heads * kv_heads // heads
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if LISTED:
        in_use = tl.load(n_listed + task)
        if tl.program_id(0) * BLOCK >= in_use:
            return
        inside = i < in_use
        rows = tl.load(listed + task * room + i, inside, other=0).to(tl.int64)
    else:
        in_use = tl.load(counts + b)
        if tl.program_id(0) * BLOCK >= in_use:
            return
        inside = i < in_use
        rows = i.to(tl.int64)
    h = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    known = h < group
    head = task * group + tl.where(known, h, 0)
    own = packed + head * (16 * N_WORDS)
    plane = coarse + b * coarse_batch + kv_head * coarse_head + rows
    words = fine + b * fine_batch + kv_head * fine_head + rows * (5 * N_WORDS)
    product = tl.zeros([HEADS, BLOCK], dtype=tl.int32)
    for w in tl.static_range(N_WORDS):
        word = tl.load(plane + w * coarse_plane, inside, other=0)
        product = _add_coarse(word, own + 2 * w, product, N_WORDS, ASM)
    if WHOLE:
        product *= 8  # the coarse bits of a code are those above three others
        for w in tl.static_range(N_WORDS):
            product = _add_fine(words + w, own + 2 * w, product, inside, N_WORDS, ASM)
    stored = tl.load(scale + b * scale_batch + kv_head * scale_head + rows, inside, other=0)
    scales = ((stored.to(tl.int32) << _SHIFT) + _BASE).to(tl.float32, bitcast=True)
    score = product.to(tl.float32) - tl.load(offsets + head)[:, None]
    place = out + head[:, None] * room + i[None, :]
    held = known[:, None] & (i < room)[None, :]
    if WHOLE:
        score = score * tl.load(factors + head)[:, None] * scales[None, :]
        tl.store(place, tl.where(inside[None, :], score, -float("inf")), held)
    else:
        score = score * scales[None, :] + _ROUND
        score = tl.minimum(tl.maximum(score - _ROUND, -32768.0), 32767.0)
        tl.store(place, score.to(tl.int16), held)
