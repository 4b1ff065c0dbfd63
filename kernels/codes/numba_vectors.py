"""Passes over the scores and weights of rows on a CPU, as Numba intrinsics; memory is passed as
addresses. *Vectors* are of `LANES` numbers of 4 bytes. *Marks* are a bit for each number."""

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from saap.kernels.cpu.emitter import F32, I32, I64, LANES, VECTOR, VECTOR_I32, Emitter

_i64, _f32 = types.int64, types.float32
_VECTOR_BYTES = 4 * LANES
_MASK, _MARK_BYTES = ir.IntType(LANES), LANES // 8

# For each mask of eight lanes, the lanes that are set, at the front: an AVX2 register is packed by
# a permutation, as there is no instruction for it.
_PERMUTES = LANES == 8 and bool(llvmlite.binding.get_host_cpu_features().get("avx2"))
_ORDER = ir.VectorType(ir.IntType(8), 8)
_PACKED = [[i for i in range(8) if mask >> i & 1] for mask in range(256)]
_PACKING = ir.Constant(
    ir.ArrayType(ir.IntType(64), 256),
    [int.from_bytes(bytes(lanes + [0] * (8 - len(lanes))), "little") for lanes in _PACKED],
)


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
    """`out = sum over heads of factors[head] * weights[head]`."""

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
def sum_below(typing_context, weights, numbers, vectors, bound):
    """Sum of the float32 `weights` whose int32 number is below the bound."""

    def codegen(context, builder, signature, args):
        weights, numbers, vectors, bound = args
        emit = Emitter(builder)
        zero = emit.same(0.0)
        total, below = emit.register(zero), _compared(emit, "<", bound)
        with cgutils.for_range(builder, vectors) as loop:
            offset = builder.mul(loop.index, I64(_VECTOR_BYTES))
            inside = below(emit.load(emit.at(numbers, offset), VECTOR_I32))
            own = builder.select(inside, emit.load(emit.at(weights, offset), VECTOR), zero)
            builder.store(builder.fadd(builder.load(total), own), total)
        return emit.total(builder.load(total))

    return _f32(*[_i64] * 4), codegen


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
        return _collect(emit, _compared(emit, ">=", least), numbers, vectors, out, None)

    return _i64(*[_i64] * 4), codegen


@intrinsic
def places_of(typing_context, numbers, vectors, number, out):
    """Places, ascending, of the int32 that are this number; returns how many.

    out: as for `places_from`.
    """

    def codegen(context, builder, signature, args):
        numbers, vectors, number, out = args
        emit = Emitter(builder)
        return _collect(emit, _compared(emit, "==", number), numbers, vectors, out, None)

    return _i64(*[_i64] * 4), codegen


@intrinsic
def values_from(typing_context, numbers, values, vectors, least, out):
    """Of the int32 `values`, those whose number is at least so large; returns how many.

    out: as for `places_from`.
    """

    def codegen(context, builder, signature, args):
        numbers, values, vectors, least, out = args
        emit = Emitter(builder)
        return _collect(emit, _compared(emit, ">=", least), numbers, vectors, out, values)

    return _i64(*[_i64] * 5), codegen


@intrinsic
def values_within(typing_context, numbers, vectors, least, end, out):
    """The int32 that are at least `least` and below `end`; returns how many. They may be written
    over the numbers themselves.

    out: as for `places_from`.
    """

    def codegen(context, builder, signature, args):
        numbers, vectors, least, end, out = args
        emit = Emitter(builder)
        width = emit.splat(builder.trunc(builder.sub(end, least), I32), VECTOR_I32)
        least = emit.splat(builder.trunc(least, I32), VECTOR_I32)

        def inside(own):
            return builder.icmp_unsigned("<", builder.sub(own, least), width)

        return _collect(emit, inside, numbers, vectors, out, numbers)

    return _i64(*[_i64] * 5), codegen


@intrinsic
def mark_from(typing_context, numbers, vectors, least, marks):
    """Set the bit of each int32 that is at least so large; the others stay."""

    def codegen(context, builder, signature, args):
        numbers, vectors, least, marks = args
        emit = Emitter(builder)
        least = emit.splat(builder.trunc(least, I32), VECTOR_I32)
        with cgutils.for_range(builder, vectors) as loop:
            place = emit.at(numbers, builder.mul(loop.index, I64(_VECTOR_BYTES)))
            inside = builder.icmp_signed(">=", emit.load(place, VECTOR_I32), least)
            at = emit.at(marks, builder.mul(loop.index, I64(_MARK_BYTES)))
            marked = builder.or_(emit.load(at, _MASK, align=1), builder.bitcast(inside, _MASK))
            builder.store(marked, builder.inttoptr(at, _MASK.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(*[_i64] * 4), codegen


@intrinsic
def places_of_marks(typing_context, marks, vectors, out):
    """Places, ascending, of the bits that are set, `LANES` to a vector; returns how many.

    out: as for `places_from`.
    """

    def codegen(context, builder, signature, args):
        marks, vectors, out = args
        emit = Emitter(builder)
        found = emit.register(I64(0))
        with cgutils.for_range(builder, vectors) as loop:
            at = emit.at(marks, builder.mul(loop.index, I64(_MARK_BYTES)))
            _store_where(emit, emit.load(at, _MASK, align=1), _numbers(emit, loop), out, found)
        return builder.load(found)

    return _i64(*[_i64] * 3), codegen


def _compared(emit, relation, bound):
    """Which lanes of a vector stand in this relation to a bound."""
    bound = emit.splat(emit.builder.trunc(bound, I32), VECTOR_I32)
    return lambda own: emit.builder.icmp_signed(relation, own, bound)


def _collect(emit, inside, numbers, vectors, out, values):
    """The values, or without these the places, of numbers that are `inside`; returns how many."""
    builder = emit.builder
    found = emit.register(I64(0))
    with cgutils.for_range(builder, vectors) as loop:
        offset = builder.mul(loop.index, I64(_VECTOR_BYTES))
        mask = builder.bitcast(inside(emit.load(emit.at(numbers, offset), VECTOR_I32)), _MASK)
        if values is None:
            own = _numbers(emit, loop)
        else:
            own = emit.load(emit.at(values, offset), VECTOR_I32)
        _store_where(emit, mask, own, out, found)
    return builder.load(found)


def _numbers(emit, loop):
    first = emit.builder.trunc(emit.builder.mul(loop.index, I64(LANES)), I32)
    lanes = ir.Constant(VECTOR_I32, list(range(LANES)))
    return emit.builder.add(emit.splat(first, VECTOR_I32), lanes)


def _store_where(emit, mask, vector, out, found):
    """Write the lanes whose bit is set to `out` from `found` on, which goes on by their number."""
    builder = emit.builder
    at = emit.at(out, builder.mul(builder.load(found), I64(4)))
    if LANES == 16:
        # Packed in a register: to memory the instruction is slow on some processors.
        inside = builder.bitcast(mask, ir.VectorType(ir.IntType(1), LANES))
        name = "llvm.x86.avx512.mask.compress.v16i32"
        emit.store(emit.call(name, VECTOR_I32, vector, vector, inside), at)
    elif _PERMUTES:
        table = cgutils.global_constant(builder, "saap_packing", _PACKING)
        row = builder.gep(table, [I32(0), builder.zext(mask, I32)])
        order = builder.load(builder.bitcast(row, _ORDER.as_pointer()), align=1)
        order = builder.zext(order, VECTOR_I32)
        emit.store(emit.call("llvm.x86.avx2.permd", VECTOR_I32, vector, order), at)
    else:
        lane_at = emit.register(at)
        for lane in range(LANES):
            place = builder.load(lane_at)
            emit.store(builder.extract_element(vector, I32(lane)), place)
            set_ = builder.and_(builder.lshr(mask, _MASK(lane)), _MASK(1))
            step = builder.mul(builder.zext(set_, ir.IntType(64)), I64(4))
            builder.store(builder.add(place, step), lane_at)
    count = emit.call(f"llvm.ctpop.i{LANES}", _MASK, mask)
    builder.store(builder.add(builder.load(found), builder.zext(count, ir.IntType(64))), found)
