"""Passes over the scores and weights of rows on a CPU, as Numba intrinsics; memory is passed as
addresses. *Vectors* are of `LANES` numbers of 4 bytes."""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from saap.kernels.cpu.emitter import F32, I32, I64, LANES, VECTOR, VECTOR_I32, Emitter

_i64, _f32 = types.int64, types.float32
_VECTOR_BYTES = 4 * LANES


@intrinsic
def exponentials(typing_context, scores, vectors, maximum):
    """`scores = exp(scores - maximum)` in place; returns their sum."""

    def codegen(context, builder, signature, args):
        scores, vectors, maximum = args
        emit = Emitter(builder)
        total, shift = emit.register(emit.same(0.0)), emit.splat(maximum)
        with cgutils.for_range(builder, vectors) as loop:
            place = emit.at(scores, builder.mul(loop.index, I64(_VECTOR_BYTES)))
            weight = emit.exp(builder.fsub(emit.load(place, VECTOR), shift))
            emit.store(weight, place)
            builder.store(builder.fadd(builder.load(total), weight), total)
        return emit.total(builder.load(total))

    return _f32(_i64, _i64, _f32), codegen


@intrinsic
def add_weighed(typing_context, weights, row_bytes, heads, factors, factor_bytes, vectors, out):
    """`out = sum over heads of factors[head] * weights[head]`; out may be `weights[0]`."""

    def codegen(context, builder, signature, args):
        weights, row_bytes, heads, factors, factor_bytes, vectors, out = args
        emit = Emitter(builder)
        total = emit.register(emit.same(0.0))
        with cgutils.for_range(builder, vectors) as loop:
            offset = builder.mul(loop.index, I64(_VECTOR_BYTES))
            place = emit.at(weights, offset)
            builder.store(emit.same(0.0), total)
            with cgutils.for_range(builder, heads) as head:
                at = emit.at(factors, builder.mul(head.index, factor_bytes))
                own = emit.load(emit.at(place, builder.mul(head.index, row_bytes)), VECTOR)
                sum_ = emit.fma(emit.splat(emit.load(at, F32)), own, builder.load(total))
                builder.store(sum_, total)
            emit.store(builder.load(total), emit.at(out, offset))
        return context.get_dummy_value()

    return types.void(*[_i64] * 7), codegen


@intrinsic
def count_from(typing_context, numbers, vectors, least):
    """How many int32 are at least so large."""

    def codegen(context, builder, signature, args):
        numbers, vectors, least = args
        emit = Emitter(builder)
        zero = ir.Constant(VECTOR_I32, [0] * LANES)
        total = emit.register(zero)
        least = emit.splat(builder.trunc(least, I32), VECTOR_I32)
        with cgutils.for_range(builder, vectors) as loop:
            place = emit.at(numbers, builder.mul(loop.index, I64(_VECTOR_BYTES)))
            inside = builder.icmp_signed(">=", emit.load(place, VECTOR_I32), least)
            one = builder.zext(inside, VECTOR_I32)
            builder.store(builder.add(builder.load(total), one), total)
        total = builder.load(total)
        count = I64(0)
        for lane in range(LANES):
            count = builder.add(
                count, builder.zext(builder.extract_element(total, I32(lane)), ir.IntType(64))
            )
        return count

    return _i64(_i64, _i64, _i64), codegen


@intrinsic
def places_from(typing_context, numbers, vectors, least, out):
    """Places, ascending, of the int32 that are at least so large; returns how many.

    out: int32, room for all and `LANES` more.
    """

    def codegen(context, builder, signature, args):
        numbers, vectors, least, out = args
        emit = Emitter(builder)
        found = emit.register(I64(0))
        least = emit.splat(builder.trunc(least, I32), VECTOR_I32)
        lanes = ir.Constant(VECTOR_I32, list(range(LANES)))
        with cgutils.for_range(builder, vectors) as loop:
            place = emit.at(numbers, builder.mul(loop.index, I64(_VECTOR_BYTES)))
            inside = builder.icmp_signed(">=", emit.load(place, VECTOR_I32), least)
            some = builder.icmp_unsigned("!=", builder.bitcast(inside, ir.IntType(LANES)),
                                         ir.IntType(LANES)(0))  # fmt: skip
            with builder.if_then(some):
                first = builder.trunc(builder.mul(loop.index, I64(LANES)), I32)
                index = builder.add(emit.splat(first, VECTOR_I32), lanes)
                _store_where(emit, inside, index, out, found)
        return builder.load(found)

    return _i64(*[_i64] * 4), codegen


def _store_where(emit, inside, index, out, found):
    """Write the lanes that are inside to `out` from `found` on, which goes on by their number."""
    builder = emit.builder
    if LANES == 16:
        # Packed in a register: to memory the instruction is slow on some processors.
        name = "llvm.x86.avx512.mask.compress.v16i32"
        index = emit.call(name, VECTOR_I32, index, index, inside)
        emit.store(index, emit.at(out, builder.mul(builder.load(found), I64(4))))
        count_type = ir.IntType(LANES)
        set_bits = builder.bitcast(inside, count_type)
        count = emit.call(f"llvm.ctpop.i{LANES}", count_type, set_bits)
        builder.store(builder.add(builder.load(found), builder.zext(count, ir.IntType(64))), found)
        return
    for lane in range(LANES):
        place = emit.at(out, builder.mul(builder.load(found), I64(4)))
        emit.store(builder.extract_element(index, I32(lane)), place)
        one = builder.zext(builder.extract_element(inside, I32(lane)), ir.IntType(64))
        builder.store(builder.add(builder.load(found), one), found)
