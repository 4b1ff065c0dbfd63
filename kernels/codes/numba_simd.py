"""The inner loops of choosing rows by their codes on a CPU, as Numba intrinsics.

Memory is passed as addresses. Lanes are rows: no sum runs across a register. A *block* of rows is
`BLOCK` of them; buffers of rows are filled up to whole blocks.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from saap.kernels.cpu.emitter import F32, I32, I64, LANES, VECTOR, VECTOR_I32, Emitter

from .layout import BYTES, COARSE, FINE, GROUPS, PER_WORD, SCALE_BASE, SCALE_SHIFT
from .numba_products import ByteProducts

WIDEST = 4
"""Query heads that one pass over codes serves."""

AT_ONCE = 2
BLOCK = AT_ONCE * LANES

_I8, _I128 = ir.IntType(8), ir.VectorType(I32, 4)
_i64 = types.int64
_VECTOR_BYTES = 4 * LANES

# Parts of the words of each plane. Their bits are multiplied where they lie in the code, those of
# coarse codes alone as if there were no others.
_COARSE = ((0, tuple(part._replace(place=0) for part in COARSE)),)
_WHOLE = tuple(enumerate((COARSE, *FINE)))


@intrinsic
def scan(typing_context, heads, whole, words, plane_bytes, n_words, scales, blocks, count,
         weights, offsets, factors, out, out_bytes, maxima):  # fmt: skip
    """Scores of `heads` (1 to `WIDEST`) queries with `count` coded rows, -inf for those after.

    `out[head, row] = factor * scale[row] * (weights . code[row] - offset)`. words: planes of
    int32, `plane_bytes` apart, `n_words` of each kind; whole: 1 for all of the code, 0 for the
    coarse part; scales: bytes; weights: signed bytes `[heads, P]`; offsets, factors: float32
    `[heads]`; out: rows `out_bytes` apart, whole blocks, of float32, or for coarse codes of int32
    in the order of the scores; maxima: float32 `[heads]`.
    """

    def emit_for(emit, heads, of_whole, planes, words, plane_bytes, n_words, scales, blocks, count,
                 weights, offsets, factors, out, out_bytes, maxima):  # fmt: skip
        builder, products = emit.builder, ByteProducts(emit)
        totals = [[emit.register(products.zero) for _ in range(AT_ONCE)] for _ in range(heads)]
        largest = [emit.register(emit.same(-np.inf)) for _ in range(heads)]
        offset, factor = (
            [emit.splat(emit.load(emit.at(source, 4 * h), F32)) for h in range(heads)]
            for source in (offsets, factors)
        )
        lanes = ir.Constant(VECTOR_I32, list(range(LANES)))
        limit = emit.splat(builder.trunc(count, I32), VECTOR_I32)
        group_bytes = builder.mul(n_words, I64(PER_WORD))
        head_bytes = builder.mul(group_bytes, I64(GROUPS))
        kind_bytes = builder.mul(n_words, plane_bytes)
        with cgutils.for_range(builder, blocks) as loop:
            row = builder.mul(loop.index, I64(BLOCK))
            for slots in totals:
                for slot in slots:
                    builder.store(products.zero, slot)
            with cgutils.for_range(builder, n_words) as word:
                own = emit.at(words, builder.mul(word.index, plane_bytes))
                own = emit.at(own, builder.mul(row, I64(4)))
                first = emit.at(weights, builder.mul(word.index, I64(PER_WORD)))
                for plane, parts in planes:
                    place = emit.at(own, builder.mul(kind_bytes, I64(plane)))
                    codes = [
                        emit.load(emit.at(place, _VECTOR_BYTES * i), VECTOR_I32)
                        for i in range(AT_ONCE)
                    ]
                    for part in parts:
                        shift, mask = part.bit - part.place, part.mask << part.place
                        move = builder.lshr if shift > 0 else builder.shl
                        by = emit.same(abs(shift), VECTOR_I32)
                        kept = emit.same(mask * 0x01010101, VECTOR_I32)
                        values = [builder.and_(move(c, by) if shift else c, kept) for c in codes]
                        at = builder.mul(group_bytes, I64(part.group))
                        at = emit.at(first, at, BYTES * part.four)
                        for slots in totals:
                            weight = emit.splat(emit.load(at, I32), VECTOR_I32)
                            for slot, value in zip(slots, values, strict=True):
                                products.add_late(slot, value, weight, mask)
                            at = emit.at(at, head_bytes)
                products.settle()
            for i in range(AT_ONCE):
                at_row = emit.at(row, LANES * i)
                small = emit.load(emit.at(scales, at_row), ir.VectorType(_I8, LANES), align=1)
                bits = builder.zext(small, VECTOR_I32)
                bits = builder.shl(bits, emit.same(SCALE_SHIFT, VECTOR_I32))
                bits = builder.add(bits, emit.same(SCALE_BASE, VECTOR_I32))
                scale = builder.bitcast(bits, VECTOR)
                rows = builder.add(emit.splat(builder.trunc(at_row, I32), VECTOR_I32), lanes)
                inside = builder.icmp_signed("<", rows, limit)
                place = emit.at(out, builder.mul(at_row, I64(4)))
                for h in range(heads):
                    total = products.as_floats(builder.load(totals[h][i]))
                    score = builder.fmul(builder.fsub(total, offset[h]), factor[h])
                    score = builder.fmul(score, scale)
                    score = builder.select(inside, score, emit.same(-np.inf))
                    builder.store(emit.larger(score, builder.load(largest[h])), largest[h])
                    emit.store(score if of_whole else _in_order(emit, score), place)
                    place = emit.at(place, out_bytes)
        for h in range(heads):
            emit.store(emit.maximum(builder.load(largest[h])), emit.at(maxima, 4 * h))

    def codegen(context, builder, signature, args):
        for of_whole, planes in ((0, _COARSE), (1, _WHOLE)):
            for n in range(1, WIDEST + 1):
                here = builder.and_(
                    builder.icmp_signed("==", args[0], I64(n)),
                    builder.icmp_signed("==", args[1], I64(of_whole)),
                )
                with builder.if_then(here):
                    emit_for(Emitter(builder), n, of_whole, planes, *args[2:])
        return context.get_dummy_value()

    return types.void(*[_i64] * 14), codegen


def _in_order(emit, score):
    """int32 that are in the order of float32."""
    builder = emit.builder
    bits = builder.bitcast(score, VECTOR_I32)
    negative = builder.ashr(bits, emit.same(31, VECTOR_I32))
    return builder.xor(bits, builder.and_(negative, emit.same(0x7FFFFFFF, VECTOR_I32)))


@intrinsic
def fine_planes(typing_context, fine, n_fine, rows, blocks, planes, plane_bytes):
    """The fine words of listed rows, plane by plane: `planes[word, i] = fine[rows[i], word]`.

    fine: int32, `n_fine` a row; rows: int32, whole blocks of valid rows.
    """

    def codegen(context, builder, signature, args):
        fine, n_fine, rows, blocks, planes, plane_bytes = args
        emit = Emitter(builder)
        vectors = builder.mul(blocks, I64(AT_ONCE))
        row_bytes = builder.mul(n_fine, I64(4))
        quarters = LANES // 4
        with cgutils.for_range(builder, vectors) as loop:
            listed = emit.at(rows, builder.mul(loop.index, I64(_VECTOR_BYTES)))
            places = []
            for r in range(LANES):
                row = builder.zext(emit.load(emit.at(listed, 4 * r), I32), ir.IntType(64))
                places.append(emit.at(fine, builder.mul(row, row_bytes)))
            out = emit.at(planes, builder.mul(loop.index, I64(_VECTOR_BYTES)))
            fours = builder.sdiv(n_fine, I64(4))
            with cgutils.for_range(builder, fours) as four:
                offset = builder.mul(four.index, I64(16))
                parts = [emit.load(emit.at(place, offset), _I128, align=4) for place in places]
                # Part a of four holds rows a, a + 4, ...: a transpose of 4 x 4 within quarters.
                mixed = [
                    _joined(builder, [parts[4 * quarter + a] for quarter in range(quarters)])
                    for a in range(4)
                ]
                place = emit.at(out, builder.mul(four.index, builder.mul(plane_bytes, I64(4))))
                for vector in _transposed(builder, mixed):
                    emit.store(vector, place)
                    place = emit.at(place, plane_bytes)
            done = builder.mul(fours, I64(4))
            with cgutils.for_range(builder, builder.sub(n_fine, done)) as one:
                word = builder.add(done, one.index)
                vector = ir.Constant(VECTOR_I32, ir.Undefined)
                for r, own in enumerate(places):
                    read = emit.load(emit.at(own, builder.mul(word, I64(4))), I32)
                    vector = builder.insert_element(vector, read, I32(r))
                emit.store(vector, emit.at(out, builder.mul(word, plane_bytes)))
        return context.get_dummy_value()

    return types.void(*[_i64] * 6), codegen


def _joined(builder, parts):
    """Vectors of four put one after the other."""
    while len(parts) > 1:
        size = parts[0].type.count * 2
        mask = ir.Constant(ir.VectorType(I32, size), list(range(size)))
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [builder.shuffle_vector(a, b, mask) for a, b in pairs]
    return parts[0]


def _transposed(builder, vectors):
    """Of four vectors, each four lanes wide groups of a 4 x 4 matrix's rows, the columns."""
    quarters = range(0, LANES, 4)

    def mixed(a, b, pattern):
        lanes = [q + (p if p < 4 else LANES + p - 4) for q in quarters for p in pattern]
        return builder.shuffle_vector(a, b, ir.Constant(VECTOR_I32, lanes))

    a, b, c, d = vectors
    low_ab, low_cd = (mixed(x, y, (0, 4, 1, 5)) for x, y in ((a, b), (c, d)))
    high_ab, high_cd = (mixed(x, y, (2, 6, 3, 7)) for x, y in ((a, b), (c, d)))
    first, second = (0, 1, 4, 5), (2, 3, 6, 7)
    return [
        mixed(low_ab, low_cd, first), mixed(low_ab, low_cd, second),
        mixed(high_ab, high_cd, first), mixed(high_ab, high_cd, second),
    ]  # fmt: skip
