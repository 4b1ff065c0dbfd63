"""The inner loops of the CPU backend, as Numba intrinsics.

Memory is passed as addresses (int64), so that strides and storage types of a store need no
signature of their own: `kind` is a value of the type that holds one element, float32, uint16 for
bfloat16, int16 for float16, int8 for rows of `int8_rows`, which end with their scale.
"""

import functools

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from saap.kernels.cpu.emitter import F32, I32, I64, LANES, VECTOR, VECTOR_I32, Emitter

CACHE_LINE = 64

DIM_STEP = 16
"""What head_dim is a multiple of."""

TILE = 32
"""Rows of a tile: K and V of it, in float32 and 128 wide, fill an L1 cache of 32 KiB."""


@intrinsic
def score(typing_context, kind, heads, q, k, k_row, rows, ahead, dim, scores):
    """Dot products of `heads` (4, 2 or 1) queries with `LANES // heads` keys.

    q: float32 `[heads, dim]`; k: rows `k_row` bytes apart, of which `rows`, int64, lists those
    to take, and `ahead` as many to ask for meanwhile; scores: float32, one row of `TILE` a head.
    Keys are read row by row, each in a loop of its own that LLVM cannot interleave with the
    next: the core's prefetcher follows that order at twice the speed.
    """
    size = kind.bitwidth // 8

    def emit_for(emit, heads, q, k, k_row, rows, ahead, dim, scores):
        builder, row_count = emit.builder, LANES // heads
        sums = [emit.register(emit.same(0.0)) for _ in range(LANES)]
        for r in range(row_count):
            key = emit.row(k, k_row, emit.at(rows, 8 * r))
            later = emit.row(k, k_row, emit.at(ahead, 8 * r))
            with cgutils.for_range(builder, builder.sdiv(dim, I64(LANES))) as loop:
                column = builder.mul(loop.index, I64(LANES * size))
                part = emit.load_stored(emit.at(key, column), kind)
                emit.prefetch(emit.at(later, column))
                query = emit.at(q, builder.mul(loop.index, I64(LANES * 4)))
                for h in range(heads):
                    slot = sums[h * row_count + r]
                    total = emit.fma(emit.load(query, VECTOR), part, builder.load(slot))
                    builder.store(total, slot)
                    query = emit.at(query, builder.mul(dim, I64(4)))
        totals = emit.totals([builder.load(slot) for slot in sums])
        if kind == types.int8:
            keys = [emit.row(k, k_row, emit.at(rows, 8 * r)) for r in range(row_count)]
            scales = emit.vector_of([emit.load(emit.at(key, dim), F32) for key in keys] * heads)
            totals = builder.fmul(totals, scales)
        for h in range(heads):
            lanes = [h * row_count + r for r in range(row_count)]
            mask = ir.Constant(ir.VectorType(I32, row_count), lanes)
            part = builder.shuffle_vector(totals, totals, mask)
            emit.store(part, emit.at(scores, 4 * TILE * h))

    def codegen(context, builder, signature, args):
        for heads in (4, 2, 1):
            with builder.if_then(builder.icmp_signed("==", args[1], I64(heads))):
                emit_for(Emitter(builder), heads, *args[2:])
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 8), codegen


@intrinsic
def softmax(typing_context, scores, count, sm_scale, softcap, maximum):
    """Turns `count` of `TILE` scores into weights `exp(score - maximum)` in place, the rest to 0.

    Returns the maximum, `maximum` or that of the scaled scores, and the sum of the weights.
    """

    def codegen(context, builder, signature, args):
        scores, count, sm_scale, softcap, maximum = args
        emit = Emitter(builder)
        addresses = [emit.at(scores, 4 * lane) for lane in range(0, TILE, LANES)]
        scale = emit.splat(sm_scale)
        slots = [
            emit.register(builder.fmul(emit.load(address, VECTOR), scale)) for address in addresses
        ]
        with builder.if_then(builder.fcmp_ordered(">", softcap, F32(0.0)), likely=False):
            cap = emit.splat(softcap)
            for slot in slots:
                ratio = builder.fdiv(builder.load(slot), cap)
                builder.store(builder.fmul(emit.tanh(ratio), cap), slot)
        used_count = emit.splat(builder.trunc(count, I32), VECTOR_I32)
        scaled = []
        for i, slot in enumerate(slots):
            lanes = ir.Constant(VECTOR_I32, [LANES * i + lane for lane in range(LANES)])
            used = builder.icmp_signed("<", lanes, used_count)
            scaled.append(builder.select(used, builder.load(slot), emit.same(-np.inf)))
        maximum = emit.larger(maximum, emit.maximum(functools.reduce(emit.larger, scaled)))
        none = builder.fcmp_ordered("==", maximum, F32(-np.inf))
        shift = emit.splat(builder.select(none, F32(0.0), maximum))
        weights = [emit.exp(builder.fsub(score, shift)) for score in scaled]
        for weight, address in zip(weights, addresses, strict=True):
            emit.store(weight, address)
        total = emit.total(functools.reduce(builder.fadd, weights))
        return context.make_tuple(builder, signature.return_type, (maximum, total))

    f32 = types.float32
    return types.UniTuple(f32, 2)(types.int64, types.int64, f32, f32, f32), codegen


@intrinsic
def accumulate(
    typing_context,
    kind,
    heads,
    vectors,
    weights,
    v,
    v_row,
    rows,
    ahead,
    count,
    dim,
    column,
    sums,
    stride,
):
    """`sums += weights @ v[rows]` in `vectors * LANES` of `dim` columns, from `column` on.

    The rows are summed up by themselves first: rounding errors then grow with the number of tiles
    and not with that of rows.
    heads (4, 2 or 1) times vectors, a power of 2, is at most LANES: they stay in registers.
    weights: float32, one row of `TILE` a head; v: rows `v_row` bytes apart, of which `rows`,
    int64, lists `count`, and `ahead` as many to ask for meanwhile; sums: float32, `heads` rows,
    `stride` apart.
    """
    size = kind.bitwidth // 8

    def emit_for(
        emit, heads, vectors, weights, v, v_row, rows, ahead, count, dim, column, sums, stride
    ):
        builder = emit.builder
        offset = builder.mul(column, I64(size))
        sums = emit.at(sums, builder.mul(column, I64(4)))
        places = {
            (h, i): emit.at(sums, builder.mul(stride, I64(4 * h)), 4 * LANES * i)
            for h in range(heads)
            for i in range(vectors)
        }
        slots = {at: emit.register(emit.same(0.0)) for at in places}
        with cgutils.for_range(builder, count) as loop:
            at = builder.mul(loop.index, I64(8))
            row, later = (
                emit.at(emit.row(v, v_row, emit.at(entries, at)), offset)
                for entries in (rows, ahead)
            )
            weight = emit.at(weights, builder.mul(loop.index, I64(4)))
            factors = [emit.load(emit.at(weight, 4 * TILE * h), F32) for h in range(heads)]
            if kind == types.int8:
                scale = emit.load(emit.at(row, builder.sub(dim, column)), F32)
                factors = [builder.fmul(factor, scale) for factor in factors]
            factors = [emit.splat(factor) for factor in factors]
            for i in range(vectors):
                part = emit.load_stored(emit.at(row, size * LANES * i), kind)
                if size * LANES * i % CACHE_LINE == 0:
                    emit.prefetch(emit.at(later, size * LANES * i))
                for h in range(heads):
                    total = emit.fma(factors[h], part, builder.load(slots[h, i]))
                    builder.store(total, slots[h, i])
        for at, place in places.items():
            own = builder.load(slots[at])
            emit.store(builder.fadd(emit.load(place, VECTOR), own), place)

    def codegen(context, builder, signature, args):
        for heads in (4, 2, 1):
            for vectors in (1 << i for i in range((LANES // heads).bit_length())):
                here = builder.and_(
                    builder.icmp_signed("==", args[1], I64(heads)),
                    builder.icmp_signed("==", args[2], I64(vectors)),
                )
                with builder.if_then(here):
                    emit_for(Emitter(builder), heads, vectors, *args[3:])
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 12), codegen
