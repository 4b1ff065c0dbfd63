"""The inner loop of choosing pages by their codes on a CPU, as a Numba intrinsic.

Memory is passed as addresses. Lanes are rows of a page, which holds a multiple of `BLOCK`.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from saap.kernels.codes.numba_products import ByteProducts
from saap.kernels.cpu.emitter import F32, I32, I64, LANES, VECTOR, VECTOR_I32, Emitter

from .layout import LARGEST, PER_WORD

WIDEST = 4
"""Query heads that one pass over codes serves."""

AT_ONCE = 2
BLOCK = AT_ONCE * LANES

_i64 = types.int64
_VECTOR_BYTES = 4 * LANES
_HALVES = ((0, 0), (4, PER_WORD // 2))
"""Of a word: shift right of its codes, number of their first coordinate."""


@intrinsic
def weigh_page(typing_context, heads, words, n_words, vectors, scales, count, weights, offsets,
               factors, scores, maxima, totals, stride):  # fmt: skip
    """For `heads` (1 to `WIDEST`) queries: a page's largest score, and the sum of
    `exp(score - largest)` over its first `count` (at least 1) rows.

    `score[head, row] = factor * scale[row] * (weights . code[row] - offset)`. words: int32
    `[n_words, rows]`; `vectors * LANES` rows; scales: float32; weights: signed bytes `[heads,
    D]`; offsets, factors: float32 `[heads]`; scores: space for float32 `[heads, rows]`; maxima,
    totals: a float32 for each head, `stride` bytes apart, are written to.
    """

    def emit_for(emit, heads, words, n_words, vectors, scales, count, weights, offsets, factors,
                 scores, maxima, totals, stride):  # fmt: skip
        builder, products = emit.builder, ByteProducts(emit)
        sums = [[emit.register(products.zero) for _ in range(AT_ONCE)] for _ in range(heads)]
        largest = [emit.register(emit.same(-np.inf)) for _ in range(heads)]
        offset, factor = (
            [emit.splat(emit.load(emit.at(source, 4 * h), F32)) for h in range(heads)]
            for source in (offsets, factors)
        )
        lanes = ir.Constant(VECTOR_I32, list(range(LANES)))
        limit = emit.splat(builder.trunc(count, I32), VECTOR_I32)
        plane_bytes = builder.mul(vectors, I64(_VECTOR_BYTES))
        head_bytes = builder.mul(n_words, I64(PER_WORD))
        with cgutils.for_range(builder, builder.sdiv(vectors, I64(AT_ONCE))) as loop:
            at_rows = builder.mul(loop.index, I64(AT_ONCE * _VECTOR_BYTES))
            for slots in sums:
                for slot in slots:
                    builder.store(products.zero, slot)
            with cgutils.for_range(builder, n_words) as word:
                place = emit.at(words, builder.mul(word.index, plane_bytes), at_rows)
                codes = [
                    emit.load(emit.at(place, _VECTOR_BYTES * i), VECTOR_I32)
                    for i in range(AT_ONCE)
                ]
                first = emit.at(weights, builder.mul(word.index, I64(PER_WORD)))
                kept = emit.same(LARGEST * 0x01010101, VECTOR_I32)
                for shift, coordinate in _HALVES:
                    by = emit.same(shift, VECTOR_I32)
                    values = [
                        builder.and_(builder.lshr(code, by) if shift else code, kept)
                        for code in codes
                    ]
                    at = emit.at(first, coordinate)
                    for slots in sums:
                        weight = emit.splat(emit.load(at, I32), VECTOR_I32)
                        for slot, value in zip(slots, values, strict=True):
                            builder.store(products.add(builder.load(slot), value, weight), slot)
                        at = emit.at(at, head_bytes)
            for i in range(AT_ONCE):
                at_vector = emit.at(at_rows, _VECTOR_BYTES * i)
                scale = emit.load(emit.at(scales, at_vector), VECTOR)
                row = builder.trunc(builder.sdiv(at_vector, I64(4)), I32)
                rows = builder.add(emit.splat(row, VECTOR_I32), lanes)
                inside = builder.icmp_signed("<", rows, limit)
                place = emit.at(scores, at_vector)
                for h in range(heads):
                    total = products.as_floats(builder.load(sums[h][i]))
                    score = builder.fmul(builder.fsub(total, offset[h]), factor[h])
                    score = builder.select(inside, builder.fmul(score, scale), emit.same(-np.inf))
                    builder.store(emit.larger(score, builder.load(largest[h])), largest[h])
                    emit.store(score, place)
                    place = emit.at(place, plane_bytes)
        for h in range(heads):
            most = emit.maximum(builder.load(largest[h]))
            every = emit.splat(most)
            summed = emit.register(emit.same(0.0))
            own = emit.at(scores, builder.mul(plane_bytes, I64(h)))
            with cgutils.for_range(builder, vectors) as loop:
                place = emit.at(own, builder.mul(loop.index, I64(_VECTOR_BYTES)))
                weight = emit.exp(builder.fsub(emit.load(place, VECTOR), every))
                builder.store(builder.fadd(builder.load(summed), weight), summed)
            at = builder.mul(stride, I64(h))
            emit.store(most, emit.at(maxima, at))
            emit.store(emit.total(builder.load(summed)), emit.at(totals, at))

    def codegen(context, builder, signature, args):
        for n in range(1, WIDEST + 1):
            with builder.if_then(builder.icmp_signed("==", args[0], I64(n))):
                emit_for(Emitter(builder), n, *args[1:])
        return context.get_dummy_value()

    return types.void(*[_i64] * 13), codegen
