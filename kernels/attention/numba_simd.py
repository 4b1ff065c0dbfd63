"""Vector code of the CPU backend: Numba intrinsics that emit LLVM's vector instructions.

Loops left to LLVM's vectoriser would need fast-math to reorder sums, and with it the guarantees
on -inf and NaN. Memory is passed as addresses (int64), so that strides and storage types of a
store need no signature of their own: `kind` is a value of the type that holds one element,
float32, uint16 for bfloat16, int16 for float16.
"""

import functools

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_HOST = llvmlite.binding.get_host_cpu_features()
LANES = 16 if _HOST.get("avx512f") else 8
CACHE_LINE = 64

TILE = 32
"""Rows of a tile: K and V of it, in float32 and 128 wide, fill an L1 cache of 32 KiB."""

_F16, _F32 = ir.HalfType(), ir.FloatType()
_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_VECTOR, _VECTOR_I32 = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
_STRIDES = [1 << i for i in range(LANES.bit_length() - 1)]

_LOG2_E, _LN2_HIGH, _LN2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4
_EXP_MIN = -87.33654
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3)
_EXP += (4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_TANH_MAX = 7.90531110763549805
_TANH_ODD = (-2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11)
_TANH_ODD += (5.12229709037114e-08, 1.48572235717979e-05, 6.37261928935436e-04)
_TANH_ODD += (4.89352455891786e-03,)
_TANH_EVEN = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03)
_TANH_EVEN += (4.89352518554385e-03,)


def _pointer_to(numba_type):
    @intrinsic
    def pointer(typing_context, address):
        def codegen(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(numba_type)(types.int64), codegen

    return pointer


float32_pointer = _pointer_to(types.float32)
int32_pointer = _pointer_to(types.int32)
int64_pointer = _pointer_to(types.int64)


class _Emitter:
    """Vector operations on top of an LLVM builder."""

    def __init__(self, builder: ir.IRBuilder):
        self.builder = builder

    def at(self, address, *offsets):
        for offset in offsets:
            address = self.builder.add(address, _I64(offset) if type(offset) is int else offset)
        return address

    def load(self, address, llvm_type, align=4):
        pointer = self.builder.inttoptr(address, llvm_type.as_pointer())
        return self.builder.load(pointer, align=align)

    def store(self, value, address):
        pointer = self.builder.inttoptr(address, value.type.as_pointer())
        self.builder.store(value, pointer, align=4)

    def row(self, base, row_bytes, entry):
        """Address of the row whose number, int64, is at `entry`."""
        return self.at(base, self.builder.mul(self.load(entry, _I64), row_bytes))

    def load_stored(self, address, kind):
        """`LANES` elements of a K or V row, as float32."""
        if kind == types.float32:
            return self.load(address, _VECTOR)
        if kind == types.int16:
            half = self.load(address, ir.VectorType(_F16, LANES), align=2)
            return self.builder.fpext(half, _VECTOR)
        upper = self.load(address, ir.VectorType(_I16, LANES), align=2)
        bits = self.builder.shl(self.builder.zext(upper, _VECTOR_I32), self.same(16, _VECTOR_I32))
        return self.builder.bitcast(bits, _VECTOR)

    def register(self, value):
        """A local variable that LLVM keeps in a register."""
        slot = cgutils.alloca_once(self.builder, value.type)
        self.builder.store(value, slot)
        return slot

    def call(self, name, returned, *arguments):
        function_type = ir.FunctionType(returned, [a.type for a in arguments])
        module = self.builder.module
        return self.builder.call(
            cgutils.get_or_insert_function(module, function_type, name), arguments
        )

    def vector(self, name, *arguments):
        return self.call(f"llvm.{name}.v{LANES}f32", _VECTOR, *arguments)

    def fma(self, a, b, c):
        return self.vector("fma", a, b, c)

    def same(self, number, vector_type=_VECTOR):
        return ir.Constant(vector_type, [number] * LANES)

    def splat(self, scalar, vector_type=_VECTOR):
        one = self.builder.insert_element(ir.Constant(vector_type, ir.Undefined), scalar, _I32(0))
        return self.builder.shuffle_vector(one, one, ir.Constant(_VECTOR_I32, [0] * LANES))

    def polynomial(self, x, coefficients):
        total = self.same(coefficients[0])
        for coefficient in coefficients[1:]:
            total = self.fma(total, x, self.same(coefficient))
        return total

    def exp(self, x):
        """e**x for x <= 0, to 1e-7 relative; 0 below the smallest normal number."""
        builder = self.builder
        normal = self.larger(x, self.same(_EXP_MIN))
        power = self.vector("nearbyint", builder.fmul(normal, self.same(_LOG2_E)))
        rest = self.fma(power, self.same(-_LN2_HIGH), x)
        rest = self.fma(power, self.same(-_LN2_LOW), rest)
        square = builder.fmul(rest, rest)
        small = self.fma(self.polynomial(rest, _EXP), square, rest)
        small = builder.fadd(small, self.same(1.0))
        exponent = builder.shl(builder.fptosi(power, _VECTOR_I32), self.same(23, _VECTOR_I32))
        bits = builder.add(builder.bitcast(small, _VECTOR_I32), exponent)
        too_small = builder.fcmp_ordered("<", x, self.same(_EXP_MIN))
        return builder.select(too_small, self.same(0.0), builder.bitcast(bits, _VECTOR))

    def tanh(self, x):
        """To a few units in the last place, by a rational function (that of Eigen)."""
        x = self.larger(self.same(-_TANH_MAX), x)
        x = self.builder.fneg(self.larger(self.same(-_TANH_MAX), self.builder.fneg(x)))
        square = self.builder.fmul(x, x)
        odd = self.builder.fmul(self.polynomial(square, _TANH_ODD), x)
        return self.builder.fdiv(odd, self.polynomial(square, _TANH_EVEN))

    def larger(self, a, b):
        """The larger; b where either is NaN: one instruction, unlike LLVM's maxnum."""
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def maximum(self, vector):
        for stride in _STRIDES:
            swapped = ir.Constant(_VECTOR_I32, [lane ^ stride for lane in range(LANES)])
            vector = self.larger(vector, self.builder.shuffle_vector(vector, vector, swapped))
        return self.builder.extract_element(vector, _I32(0))

    def total(self, vector):
        """Sum of the lanes."""
        for stride in _STRIDES:
            vector = self._fold(vector, vector, stride)
        return self.builder.extract_element(vector, _I32(0))

    def totals(self, vectors):
        """Lane i of the result is the sum of the lanes of `vectors[i]`."""
        for stride in _STRIDES:
            pairs = zip(vectors[::2], vectors[1::2], strict=True)
            vectors = [self._fold(a, b, stride) for a, b in pairs]
        return vectors[0]

    def _fold(self, a, b, stride):
        """Lanes i and i + stride added: of a where i has no bit `stride`, of b where it has."""
        left = [i if not i & stride else LANES + i - stride for i in range(LANES)]
        right = [i + stride if not i & stride else LANES + i for i in range(LANES)]
        shuffled = [
            self.builder.shuffle_vector(a, b, ir.Constant(_VECTOR_I32, mask))
            for mask in (left, right)
        ]
        return self.builder.fadd(*shuffled)


@intrinsic
def fetch_increment(typing_context, address):
    """`address[0] += 1`, atomically; returns the value before. Orders memory between threads."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], _I64.as_pointer())
        return builder.atomic_rmw("add", pointer, _I64(1), "acq_rel")

    return types.int64(types.int64), codegen


@intrinsic
def prefetch(typing_context, address):
    """Asks for the cache line at this address."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], ir.IntType(8).as_pointer())
        to_read, to_all_caches, data = _I32(0), _I32(3), _I32(1)
        _Emitter(builder).call(
            "llvm.prefetch.p0", ir.VoidType(), pointer, to_read, to_all_caches, data
        )
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def score(typing_context, kind, heads, q, k, k_row, rows, dim, scores):
    """Dot products of `heads` (4, 2 or 1) queries with `LANES // heads` keys.

    q: float32 `[heads, dim]`; k: rows `k_row` bytes apart, of which `rows`, int64, lists those
    to take; scores: float32, one row of `TILE` a head. Keys are read row by row, each in a loop
    of its own that LLVM cannot interleave with the next: the core's prefetcher follows that
    order at twice the speed.
    """
    size = kind.bitwidth // 8

    def emit_for(emit, heads, q, k, k_row, rows, dim, scores):
        builder, row_count = emit.builder, LANES // heads
        sums = [emit.register(emit.same(0.0)) for _ in range(LANES)]
        for r in range(row_count):
            key = emit.row(k, k_row, emit.at(rows, 8 * r))
            with cgutils.for_range(builder, builder.sdiv(dim, _I64(LANES))) as loop:
                column = builder.mul(loop.index, _I64(LANES * size))
                part = emit.load_stored(emit.at(key, column), kind)
                query = emit.at(q, builder.mul(loop.index, _I64(LANES * 4)))
                for h in range(heads):
                    slot = sums[h * row_count + r]
                    total = emit.fma(emit.load(query, _VECTOR), part, builder.load(slot))
                    builder.store(total, slot)
                    query = emit.at(query, builder.mul(dim, _I64(4)))
        totals = emit.totals([builder.load(slot) for slot in sums])
        for h in range(heads):
            lanes = [h * row_count + r for r in range(row_count)]
            mask = ir.Constant(ir.VectorType(_I32, row_count), lanes)
            part = builder.shuffle_vector(totals, totals, mask)
            emit.store(part, emit.at(scores, 4 * TILE * h))

    def codegen(context, builder, signature, args):
        for heads in (4, 2, 1):
            with builder.if_then(builder.icmp_signed("==", args[1], _I64(heads))):
                emit_for(_Emitter(builder), heads, *args[2:])
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 7), codegen


@intrinsic
def softmax(typing_context, scores, count, sm_scale, softcap, maximum):
    """Turns `count` of `TILE` scores into weights `exp(score - maximum)` in place, the rest to 0.

    Returns the maximum, `maximum` or that of the scaled scores, and the sum of the weights.
    """

    def codegen(context, builder, signature, args):
        scores, count, sm_scale, softcap, maximum = args
        emit = _Emitter(builder)
        addresses = [emit.at(scores, 4 * lane) for lane in range(0, TILE, LANES)]
        scale = emit.splat(sm_scale)
        slots = [
            emit.register(builder.fmul(emit.load(address, _VECTOR), scale))
            for address in addresses
        ]
        with builder.if_then(builder.fcmp_ordered(">", softcap, _F32(0.0)), likely=False):
            cap = emit.splat(softcap)
            for slot in slots:
                ratio = builder.fdiv(builder.load(slot), cap)
                builder.store(builder.fmul(emit.tanh(ratio), cap), slot)
        used_count = emit.splat(builder.trunc(count, _I32), _VECTOR_I32)
        scaled = []
        for i, slot in enumerate(slots):
            lanes = ir.Constant(_VECTOR_I32, [LANES * i + lane for lane in range(LANES)])
            used = builder.icmp_signed("<", lanes, used_count)
            scaled.append(builder.select(used, builder.load(slot), emit.same(-np.inf)))
        maximum = emit.larger(maximum, emit.maximum(functools.reduce(emit.larger, scaled)))
        none = builder.fcmp_ordered("==", maximum, _F32(-np.inf))
        shift = emit.splat(builder.select(none, _F32(0.0), maximum))
        weights = [emit.exp(builder.fsub(score, shift)) for score in scaled]
        for weight, address in zip(weights, addresses, strict=True):
            emit.store(weight, address)
        total = emit.total(functools.reduce(builder.fadd, weights))
        return context.make_tuple(builder, signature.return_type, (maximum, total))

    f32 = types.float32
    return types.UniTuple(f32, 2)(types.int64, types.int64, f32, f32, f32), codegen


@intrinsic
def accumulate(
    typing_context, kind, heads, vectors, weights, v, v_row, rows, count, column, sums, stride
):
    """`sums += weights @ v[rows]` in `vectors * LANES` columns from `column` on.

    heads (4, 2 or 1) times vectors, a power of 2, is at most LANES: they stay in registers.
    weights: float32, one row of `TILE` a head; v: rows `v_row` bytes apart, of which `rows`,
    int64, lists `count`; sums: float32, `heads` rows, `stride` apart.
    """
    size = kind.bitwidth // 8

    def emit_for(emit, heads, vectors, weights, v, v_row, rows, count, column, sums, stride):
        builder = emit.builder
        offset = builder.mul(column, _I64(size))
        sums = emit.at(sums, builder.mul(column, _I64(4)))
        places = {
            (h, i): emit.at(sums, builder.mul(stride, _I64(4 * h)), 4 * LANES * i)
            for h in range(heads)
            for i in range(vectors)
        }
        slots = {at: emit.register(emit.load(place, _VECTOR)) for at, place in places.items()}
        with cgutils.for_range(builder, count) as loop:
            entry = emit.at(rows, builder.mul(loop.index, _I64(8)))
            row = emit.at(emit.row(v, v_row, entry), offset)
            weight = emit.at(weights, builder.mul(loop.index, _I64(4)))
            factors = [
                emit.splat(emit.load(emit.at(weight, 4 * TILE * h), _F32)) for h in range(heads)
            ]
            for i in range(vectors):
                part = emit.load_stored(emit.at(row, size * LANES * i), kind)
                for h in range(heads):
                    total = emit.fma(factors[h], part, builder.load(slots[h, i]))
                    builder.store(total, slots[h, i])
        for at, place in places.items():
            emit.store(builder.load(slots[at]), place)

    def codegen(context, builder, signature, args):
        for heads in (4, 2, 1):
            for vectors in (1 << i for i in range((LANES // heads).bit_length())):
                here = builder.and_(
                    builder.icmp_signed("==", args[1], _I64(heads)),
                    builder.icmp_signed("==", args[2], _I64(vectors)),
                )
                with builder.if_then(here):
                    emit_for(_Emitter(builder), heads, vectors, *args[3:])
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 10), codegen
