"""Attention of many query rows over the tokens of a list: what verifies drafts, or a large group.

Few query rows wait for memory; many of them, for arithmetic. So a tile's keys and values are
brought together first, in float32, and products are computed as matrix products are: blocks of
sums that stay in registers, vectors along the query rows for the scores and along the columns for
the values. The layout of the scores is `[TILE, padded]`: query rows side by side, filled up to
whole vectors.
"""

import numba
import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from saap.kernels.cpu.emitter import F32, I64, LANES, VECTOR, Emitter
from saap.kernels.cpu.memory import float32_pointer

from .numba_simd import DIM_STEP, TILE

_njit = numba.njit(error_model="numpy")

LEAST_ROWS = LANES + 1
"""Query rows of a list, more than a vector, from which on this is faster than `numba_tiles`."""

ROWS_AT_ONCE, MOST_VECTORS = 4, 3
"""Keys and vectors of query rows whose scores are in registers together: 12 of 16."""

HEADS_AT_ONCE, VECTORS_AT_ONCE = (6, 4, 2, 1), 2
"""Query rows and vectors of values whose sums are."""

_ALL_WHOLE = DIM_STEP % (VECTORS_AT_ONCE * LANES) == 0
_VECTORS = (VECTORS_AT_ONCE,) if _ALL_WHOLE else (1, VECTORS_AT_ONCE)


def floats(group: int, dim: int) -> int:
    """The `space` that a worker needs, in float32."""
    n = padded(group)
    return dim * n + 2 * TILE * dim + TILE * n + 3 * n


@_njit
def padded(group):
    return (group + LANES - 1) // LANES * LANES


@_njit
def begin(job, q, space):
    """Queries `[group, dim]` as `[dim, padded]`, with 0 for those that are not there; nothing has
    been seen."""
    group, dim = job.group, job.dim
    n = padded(group)
    own = carray(float32_pointer(q), group * dim)
    turned = carray(float32_pointer(space), dim * n)
    for d in range(dim):
        for g in range(n):
            turned[d * n + g] = own[g * dim + d] if g < group else np.float32(0)
    sums = carray(float32_pointer(_sums(job, space)), 2 * n)
    for g in range(n):
        sums[g], sums[n + g] = -np.inf, 0


@_njit
def end(job, space, state):
    """Maxima and sums of weights go to where a piece's state has them."""
    group, dim = job.group, job.dim
    n = padded(group)
    sums = carray(float32_pointer(_sums(job, space)), 2 * n)
    for g in range(group):
        head = g * (dim + LANES)
        state[head + dim], state[head + dim + 1] = sums[g], sums[n + g]


@_njit
def _sums(job, space):
    """`[3, padded]`: maxima, sums of weights, and what sums of values count by."""
    return space + 4 * (2 * TILE * job.dim + (job.dim + TILE) * padded(job.group))


@_njit
def attend_tile(job, kind, k, v, rows, ahead, count, space, state):
    """One tile of `count` rows, into `state` and the sums in `space`; `ahead`: of the next one."""
    group, dim = job.group, job.dim
    n = padded(group)
    queries = space
    keys = queries + 4 * dim * n
    values = keys + 4 * TILE * dim
    scores = values + 4 * TILE * dim
    sums = _sums(job, space)
    whole = (count + ROWS_AT_ONCE - 1) // ROWS_AT_ONCE * ROWS_AT_ONCE
    bring(kind, k, job.k_row, rows, ahead, whole, dim, keys)
    column = 0
    while column < n:
        vectors = min(MOST_VECTORS, (n - column) // LANES)
        for row in range(0, whole, ROWS_AT_ONCE):
            to = scores + 4 * (row * n + column)
            _score(vectors, queries + 4 * column, n, keys + 4 * row * dim, dim, to)
        column += vectors * LANES
    rescaled = False
    for column in range(0, n, LANES):
        own = sums + 4 * column
        to = scores + 4 * column
        rescaled |= _softmax(to, n, count, np.float32(job.sm_scale), np.float32(job.softcap), own)
    stride = dim + LANES
    if rescaled:
        factors = carray(float32_pointer(sums + 8 * n), n)
        for g in range(group):
            if factors[g] != 1:
                for d in range(g * stride, g * stride + dim):
                    state[d] *= factors[g]
    bring(kind, v, job.v_row, rows, ahead, count, dim, values)
    head = 0
    while head < group:
        heads = 1
        for most in HEADS_AT_ONCE:
            if most <= group - head:
                heads = most
                break
        column = 0
        while column < dim:
            vectors = VECTORS_AT_ONCE if dim - column >= VECTORS_AT_ONCE * LANES else 1
            to = state.ctypes.data + 4 * (head * stride + column)
            _accumulate(heads, vectors, scores + 4 * head, n, values + 4 * column, dim, count,
                        to, stride)  # fmt: skip
            column += vectors * LANES
        head += heads


@intrinsic
def bring(typing_context, kind, base, row_bytes, rows, ahead, count, dim, to):
    """`count` rows, `row_bytes` apart, of which `rows`, int64, has the numbers, as float32
    `[count, dim]`; those `ahead` are asked for."""
    size = kind.bitwidth // 8

    def codegen(context, builder, signature, args):
        _, base, row_bytes, rows, ahead, count, dim, to = args
        emit = Emitter(builder)
        with cgutils.for_range(builder, count) as row:
            entry = builder.mul(row.index, I64(8))
            here = emit.row(base, row_bytes, emit.at(rows, entry))
            there = emit.row(base, row_bytes, emit.at(ahead, entry))
            out = emit.at(to, builder.mul(builder.mul(row.index, dim), I64(4)))
            scale = emit.splat(emit.load(emit.at(here, dim), F32)) if kind == types.int8 else None
            with cgutils.for_range(builder, builder.sdiv(dim, I64(LANES))) as loop:
                at = builder.mul(loop.index, I64(LANES * size))
                emit.prefetch(emit.at(there, at))
                part = emit.load_stored(emit.at(here, at), kind)
                if scale is not None:
                    part = builder.fmul(part, scale)
                emit.store(part, emit.at(out, builder.mul(loop.index, I64(LANES * 4))))
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 7), codegen


@intrinsic
def _score(typing_context, vectors, queries, n, keys, dim, scores):
    """Products of `vectors` (3, 2 or 1) vectors of queries with `ROWS_AT_ONCE` keys.

    queries: float32 `[dim, n]`, from the first column on; keys: `[ROWS_AT_ONCE, dim]`; scores:
    `[ROWS_AT_ONCE, n]`.
    """

    def emit_for(emit, vectors, queries, n, keys, dim, scores):
        builder = emit.builder
        places = [(r, i) for r in range(ROWS_AT_ONCE) for i in range(vectors)]
        slots = {place: emit.register(emit.same(0.0)) for place in places}
        row_bytes = builder.mul(n, I64(4))
        with cgutils.for_range(builder, dim) as loop:
            query = emit.at(queries, builder.mul(loop.index, row_bytes))
            parts = [emit.load(emit.at(query, 4 * LANES * i), VECTOR) for i in range(vectors)]
            key = emit.at(keys, builder.mul(loop.index, I64(4)))
            for r in range(ROWS_AT_ONCE):
                own = emit.splat(emit.load(emit.at(key, builder.mul(dim, I64(4 * r))), F32))
                for i in range(vectors):
                    slot = slots[r, i]
                    builder.store(emit.fma(own, parts[i], builder.load(slot)), slot)
        for r, i in places:
            to = emit.at(scores, builder.mul(row_bytes, I64(r)), 4 * LANES * i)
            emit.store(builder.load(slots[r, i]), to)

    def codegen(context, builder, signature, args):
        for vectors in range(1, MOST_VECTORS + 1):
            with builder.if_then(builder.icmp_signed("==", args[0], I64(vectors))):
                emit_for(Emitter(builder), vectors, *args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), codegen


@intrinsic
def _softmax(typing_context, scores, n, count, sm_scale, softcap, sums):
    """Turns a vector's column of `count` rows of scores into weights, in place.

    sums: float32 `[3, n]`, from this column on: the maxima and the sums of weights so far, which
    are kept up, and what sums of values count by from now on. Returns whether any counts by
    something else than 1.
    """

    def codegen(context, builder, signature, args):
        scores, n, count, sm_scale, softcap, sums = args
        emit = Emitter(builder)
        row_bytes = builder.mul(n, I64(4))
        scale, cap = emit.splat(sm_scale), emit.splat(softcap)
        capped = builder.fcmp_ordered(">", softcap, F32(0.0))
        before = emit.load(sums, VECTOR)
        maximum = emit.register(before)
        with cgutils.for_range(builder, count) as loop:
            at = emit.at(scores, builder.mul(loop.index, row_bytes))
            slot = emit.register(builder.fmul(emit.load(at, VECTOR), scale))
            with builder.if_then(capped, likely=False):
                ratio = builder.fdiv(builder.load(slot), cap)
                builder.store(builder.fmul(emit.tanh(ratio), cap), slot)
            score = builder.load(slot)
            emit.store(score, at)
            builder.store(emit.larger(score, builder.load(maximum)), maximum)
        largest = builder.load(maximum)
        none = builder.fcmp_ordered("==", largest, emit.same(-np.inf))
        shift = builder.select(none, emit.same(0.0), largest)
        total = emit.register(emit.same(0.0))
        with cgutils.for_range(builder, count) as loop:
            at = emit.at(scores, builder.mul(loop.index, row_bytes))
            weight = emit.exp(builder.fsub(emit.load(at, VECTOR), shift))
            emit.store(weight, at)
            builder.store(builder.fadd(builder.load(total), weight), total)
        grown = builder.fcmp_ordered(">", largest, before)
        factor = builder.select(grown, emit.exp(builder.fsub(before, shift)), emit.same(1.0))
        so_far = emit.at(sums, row_bytes)
        own = builder.fmul(emit.load(so_far, VECTOR), factor)
        emit.store(builder.fadd(own, builder.load(total)), so_far)
        emit.store(largest, sums)
        emit.store(factor, emit.at(so_far, row_bytes))
        bits = builder.bitcast(grown, ir.IntType(LANES))
        return builder.icmp_signed("!=", bits, ir.Constant(bits.type, 0))

    f32 = types.float32
    signature = types.boolean(*[types.int64] * 3, f32, f32, types.int64)
    return signature, codegen


@intrinsic
def _accumulate(typing_context, heads, vectors, weights, n, values, dim, count, sums, stride):
    """`sums += weights @ values` of `heads` (6, 4, 2 or 1) query rows in `vectors` (2; or 1 where
    a vector is as wide as `DIM_STEP`).

    A tile is summed up by itself first: rounding errors then grow with the number of tiles and
    not with that of rows. weights: `[count, n]`; values: `[count, dim]`; sums: `stride` apart.
    """

    def emit_for(emit, heads, vectors, weights, n, values, dim, count, sums, stride):
        builder = emit.builder
        places = [(h, i) for h in range(heads) for i in range(vectors)]
        slots = {place: emit.register(emit.same(0.0)) for place in places}
        with cgutils.for_range(builder, count) as loop:
            row = emit.at(values, builder.mul(builder.mul(loop.index, dim), I64(4)))
            parts = [emit.load(emit.at(row, 4 * LANES * i), VECTOR) for i in range(vectors)]
            weight = emit.at(weights, builder.mul(builder.mul(loop.index, n), I64(4)))
            for h in range(heads):
                own = emit.splat(emit.load(emit.at(weight, 4 * h), F32))
                for i in range(vectors):
                    slot = slots[h, i]
                    builder.store(emit.fma(own, parts[i], builder.load(slot)), slot)
        for h, i in places:
            to = emit.at(sums, builder.mul(stride, I64(4 * h)), 4 * LANES * i)
            emit.store(builder.fadd(emit.load(to, VECTOR), builder.load(slots[h, i])), to)

    def codegen(context, builder, signature, args):
        for heads in HEADS_AT_ONCE:
            for vectors in _VECTORS:
                here = builder.and_(
                    builder.icmp_signed("==", args[0], I64(heads)),
                    builder.icmp_signed("==", args[1], I64(vectors)),
                )
                with builder.if_then(here):
                    emit_for(Emitter(builder), heads, vectors, *args[2:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9), codegen
