"""The inner loops of scoring cells on a CPU, as Numba intrinsics; memory is passed as addresses.

A *vector* is `LANES` floats. The scores of a bucket lie together: its query heads one after the
other, and of each the segments, filled up to whole vectors with cells that hold nothing.
"""

import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from saap.kernels.cpu.emitter import F32, I32, I64, LANES, VECTOR, Emitter

ROWS = 4
"""Keys that `products` takes at once, if there are as many."""

WIDEST = 4 if LANES == 16 else 2
"""Vectors that it takes at once: with `ROWS` sums of each they stay in registers."""

_F32 = types.float32
_I64 = types.int64
VECTOR_BYTES = 4 * LANES


@intrinsic
def matvec(typing_context, kind, matrix, scales, bias, x, rows, columns, out):
    """`out = scales * (matrix @ x) + bias`; rows at least `LANES`, columns a multiple of it.

    kind: a value of the type that stores the matrix, float32 or int8; scales, a number a row, are
    for int8 alone.
    """
    size = kind.bitwidth // 8

    def codegen(context, builder, signature, args):
        _, matrix, scales, bias, x, rows, columns, out = args
        emit = Emitter(builder)
        row_bytes = builder.mul(columns, I64(size))
        blocks = builder.sdiv(builder.add(rows, I64(LANES - 1)), I64(LANES))
        last = builder.sub(rows, I64(LANES))
        sums = [emit.register(emit.same(0.0)) for _ in range(LANES)]
        with cgutils.for_range(builder, blocks) as block:
            first = builder.mul(block.index, I64(LANES))
            # The last block may do again what the one before it did.
            first = builder.select(builder.icmp_signed(">", first, last), last, first)
            own = emit.at(matrix, builder.mul(first, row_bytes))
            for slot in sums:
                builder.store(emit.same(0.0), slot)
            with cgutils.for_range(builder, builder.sdiv(columns, I64(LANES))) as loop:
                offset = builder.mul(loop.index, I64(VECTOR_BYTES))
                part = emit.load(emit.at(x, offset), VECTOR)
                entry = emit.at(own, builder.mul(loop.index, I64(size * LANES)))
                for slot in sums:
                    weights = emit.load_stored(entry, kind)
                    builder.store(emit.fma(weights, part, builder.load(slot)), slot)
                    entry = emit.at(entry, row_bytes)
            totals = emit.totals([builder.load(slot) for slot in sums])
            place = builder.mul(first, I64(4))
            if kind == types.int8:
                totals = builder.fmul(totals, emit.load(emit.at(scales, place), VECTOR))
            totals = builder.fadd(totals, emit.load(emit.at(bias, place), VECTOR))
            emit.store(totals, emit.at(out, place))
        return context.get_dummy_value()

    return types.void(kind, *[_I64] * 7), codegen


@intrinsic
def products(typing_context, rows, vectors, keys, key_bytes, turned, turned_bytes, dim, out):
    """`out[r] = sum over d of keys[r, d] * turned[d]` for `rows` keys and `vectors` of columns.

    rows: `ROWS` or 1; vectors: a power of 2 up to `WIDEST`. Rows of `turned` and of `out` are
    `turned_bytes` apart.
    """

    def emit_for(emit, rows, vectors, keys, key_bytes, turned, turned_bytes, dim, out):
        builder = emit.builder
        sums = [[emit.register(emit.same(0.0)) for _ in range(vectors)] for _ in range(rows)]
        with cgutils.for_range(builder, dim) as loop:
            queries = emit.at(turned, builder.mul(loop.index, turned_bytes))
            parts = [emit.load(emit.at(queries, VECTOR_BYTES * v), VECTOR) for v in range(vectors)]
            entry = emit.at(keys, builder.mul(loop.index, I64(4)))
            for own in sums:
                key = emit.splat(emit.load(entry, F32))
                for slot, part in zip(own, parts, strict=True):
                    builder.store(emit.fma(key, part, builder.load(slot)), slot)
                entry = emit.at(entry, key_bytes)
        for own in sums:
            for v, slot in enumerate(own):
                emit.store(builder.load(slot), emit.at(out, VECTOR_BYTES * v))
            out = emit.at(out, turned_bytes)

    def codegen(context, builder, signature, args):
        for n_rows in (ROWS, 1):
            for width in (1 << i for i in range(WIDEST.bit_length())):
                here = builder.and_(
                    builder.icmp_signed("==", args[0], I64(n_rows)),
                    builder.icmp_signed("==", args[1], I64(width)),
                )
                with builder.if_then(here):
                    emit_for(Emitter(builder), n_rows, width, *args[2:])
        return context.get_dummy_value()

    return types.void(*[_I64] * 8), codegen


@intrinsic
def blend(typing_context, scores, stride, sizes, count, vectors, base, keep):
    """`scores = scores * keep + base[bucket]`, and -inf where a cell is empty; their maximum.

    Of `count` buckets, `stride` bytes apart, `vectors` each; sizes: float32, `vectors` a bucket.
    """

    def codegen(context, builder, signature, args):
        scores, stride, sizes, count, vectors, base, keep = args
        emit = Emitter(builder)
        best = emit.register(emit.same(-np.inf))
        keep = emit.splat(keep)
        with cgutils.for_range(builder, count) as bucket:
            term = emit.load(emit.at(base, builder.mul(bucket.index, I64(4))), F32)
            term = emit.splat(term)
            row = emit.at(scores, builder.mul(bucket.index, stride))
            first = builder.mul(bucket.index, vectors)
            with cgutils.for_range(builder, vectors) as loop:
                place = emit.at(row, builder.mul(loop.index, I64(VECTOR_BYTES)))
                cell = builder.mul(builder.add(first, loop.index), I64(VECTOR_BYTES))
                size = emit.load(emit.at(sizes, cell), VECTOR)
                score = emit.fma(emit.load(place, VECTOR), keep, term)
                filled = builder.fcmp_ordered(">", size, emit.same(0.0))
                score = builder.select(filled, score, emit.same(-np.inf))
                emit.store(score, place)
                builder.store(emit.larger(score, builder.load(best)), best)
        return emit.maximum(builder.load(best))

    return _F32(*[_I64] * 6, _F32), codegen


@intrinsic
def exponentials(typing_context, scores, stride, sizes, count, vectors, maximum):
    """`scores = exp(scores - maximum)`; returns the sum of `scores * sizes`."""

    def codegen(context, builder, signature, args):
        scores, stride, sizes, count, vectors, maximum = args
        emit = Emitter(builder)
        total = emit.register(emit.same(0.0))
        shift = emit.splat(maximum)
        with cgutils.for_range(builder, count) as bucket:
            row = emit.at(scores, builder.mul(bucket.index, stride))
            first = builder.mul(bucket.index, vectors)
            with cgutils.for_range(builder, vectors) as loop:
                place = emit.at(row, builder.mul(loop.index, I64(VECTOR_BYTES)))
                cell = builder.mul(builder.add(first, loop.index), I64(VECTOR_BYTES))
                weight = emit.exp(builder.fsub(emit.load(place, VECTOR), shift))
                emit.store(weight, place)
                size = emit.load(emit.at(sizes, cell), VECTOR)
                builder.store(emit.fma(weight, size, builder.load(total)), total)
        return emit.total(builder.load(total))

    return _F32(*[_I64] * 5, _F32), codegen


@intrinsic
def combine(typing_context, scores, stride, heads, factors, sizes, by_size, count, vectors, out):
    """`out[bucket] = sum over heads of factors[head] * scores[bucket, head]`.

    Times the size of the cell where `by_size` is not 0. `out` has `vectors` a bucket.
    """

    def codegen(context, builder, signature, args):
        scores, stride, heads, factors, sizes, by_size, count, vectors, out = args
        emit = Emitter(builder)
        sum_ = emit.register(emit.same(0.0))
        head_bytes = builder.mul(vectors, I64(VECTOR_BYTES))
        with cgutils.for_range(builder, count) as bucket:
            row = emit.at(scores, builder.mul(bucket.index, stride))
            first = builder.mul(bucket.index, vectors)
            with cgutils.for_range(builder, vectors) as loop:
                builder.store(emit.same(0.0), sum_)
                column = emit.at(row, builder.mul(loop.index, I64(VECTOR_BYTES)))
                with cgutils.for_range(builder, heads) as head:
                    factor = emit.load(emit.at(factors, builder.mul(head.index, I64(4))), F32)
                    own = emit.load(emit.at(column, builder.mul(head.index, head_bytes)), VECTOR)
                    builder.store(emit.fma(emit.splat(factor), own, builder.load(sum_)), sum_)
                cell = builder.mul(builder.add(first, loop.index), I64(VECTOR_BYTES))
                with builder.if_then(builder.icmp_signed("!=", by_size, I64(0))):
                    size = emit.load(emit.at(sizes, cell), VECTOR)
                    builder.store(builder.fmul(size, builder.load(sum_)), sum_)
                emit.store(builder.load(sum_), emit.at(out, cell))
        return context.get_dummy_value()

    return types.void(*[_I64] * 9), codegen


@intrinsic
def ordered_bits(typing_context, number):
    """An int64 above 0 that is larger where the float32 is larger: equal for 0 and -0, and 1,
    below that of -inf, for NaN."""

    def codegen(context, builder, signature, args):
        bits = builder.bitcast(args[0], I32)
        negative = builder.icmp_signed("<", bits, I32(0))
        sign = I32(-(2**31))
        # Minus as integers turns the order around and leaves -0 where 0 comes to lie.
        flipped = builder.select(negative, builder.neg(bits), builder.or_(bits, sign))
        is_nan = builder.fcmp_unordered("uno", args[0], args[0])
        return builder.select(is_nan, I64(1), builder.zext(flipped, I64))

    return _I64(_F32), codegen
