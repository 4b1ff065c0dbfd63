"""LLVM's vector instructions, as the CPU backend's intrinsics put them together.

Loops left to LLVM's vectoriser would need fast-math to reorder sums, and with it the guarantees
on -inf and NaN.
"""

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils

_HOST = llvmlite.binding.get_host_cpu_features()
LANES = 16 if _HOST.get("avx512f") else 8

_F16, F32 = ir.HalfType(), ir.FloatType()
_I16, I32, I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
VECTOR, VECTOR_I32 = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
_STRIDES = [1 << i for i in range(LANES.bit_length() - 1)]

_LOG2_E, _LN2_HIGH, _LN2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4
_EXP_MIN = -87.33654
_ONE_AS_BITS = 0x3F800000
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3)
_EXP += (4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_TANH_MAX = 7.90531110763549805
_TANH_ODD = (-2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11)
_TANH_ODD += (5.12229709037114e-08, 1.48572235717979e-05, 6.37261928935436e-04)
_TANH_ODD += (4.89352455891786e-03,)
_TANH_EVEN = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03)
_TANH_EVEN += (4.89352518554385e-03,)


class Emitter:
    """Vector operations on top of an LLVM builder."""

    def __init__(self, builder: ir.IRBuilder):
        self.builder = builder

    def at(self, address, *offsets):
        for offset in offsets:
            address = self.builder.add(address, I64(offset) if type(offset) is int else offset)
        return address

    def load(self, address, llvm_type, align=4):
        pointer = self.builder.inttoptr(address, llvm_type.as_pointer())
        return self.builder.load(pointer, align=align)

    def store(self, value, address):
        pointer = self.builder.inttoptr(address, value.type.as_pointer())
        self.builder.store(value, pointer, align=4)

    def prefetch(self, address):
        """Asks for the cache line at this address, into the second-level cache.

        Not the first: the few misses that it can wait for at a time would be the bandwidth's
        limit.
        """
        pointer = self.builder.inttoptr(address, ir.IntType(8).as_pointer())
        to_read, to_second_level, data = I32(0), I32(2), I32(1)
        self.call("llvm.prefetch.p0", ir.VoidType(), pointer, to_read, to_second_level, data)

    def row(self, base, row_bytes, entry):
        """Address of the row whose number, int64, is at `entry`."""
        return self.at(base, self.builder.mul(self.load(entry, I64), row_bytes))

    def load_stored(self, address, kind):
        """`LANES` elements of a row, as float32; `kind` is the type that stores one."""
        if kind == types.float32:
            return self.load(address, VECTOR)
        if kind == types.int8:
            small = self.load(address, ir.VectorType(ir.IntType(8), LANES), align=1)
            return self.builder.sitofp(self.builder.sext(small, VECTOR_I32), VECTOR)
        if kind == types.int16:
            half = self.load(address, ir.VectorType(_F16, LANES), align=2)
            return self.builder.fpext(half, VECTOR)
        upper = self.load(address, ir.VectorType(_I16, LANES), align=2)
        bits = self.builder.shl(self.builder.zext(upper, VECTOR_I32), self.same(16, VECTOR_I32))
        return self.builder.bitcast(bits, VECTOR)

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
        return self.call(f"llvm.{name}.v{LANES}f32", VECTOR, *arguments)

    def fma(self, a, b, c):
        return self.vector("fma", a, b, c)

    def same(self, number, vector_type=VECTOR):
        return ir.Constant(vector_type, [number] * LANES)

    def splat(self, scalar, vector_type=VECTOR):
        one = self.builder.insert_element(ir.Constant(vector_type, ir.Undefined), scalar, I32(0))
        return self.builder.shuffle_vector(one, one, ir.Constant(VECTOR_I32, [0] * LANES))

    def vector_of(self, scalars):
        """`LANES` scalars side by side."""
        vector = ir.Constant(VECTOR, ir.Undefined)
        for lane, scalar in enumerate(scalars):
            vector = self.builder.insert_element(vector, scalar, I32(lane))
        return vector

    def polynomial(self, x, coefficients):
        total = self.same(coefficients[0])
        for coefficient in coefficients[1:]:
            total = self.fma(total, x, self.same(coefficient))
        return total

    def exp(self, x):
        """e**x for x <= 0, to 1e-7 relative; 0 below the smallest normal number; NaN for NaN."""
        builder = self.builder
        normal = self.larger(x, self.same(_EXP_MIN))
        power = self.vector("nearbyint", builder.fmul(normal, self.same(_LOG2_E)))
        rest = self.fma(power, self.same(-_LN2_HIGH), x)
        rest = self.fma(power, self.same(-_LN2_LOW), rest)
        square = builder.fmul(rest, rest)
        small = self.fma(self.polynomial(rest, _EXP), square, rest)
        small = builder.fadd(small, self.same(1.0))
        exponent = builder.shl(builder.fptosi(power, VECTOR_I32), self.same(23, VECTOR_I32))
        # 2**power is multiplied by, not added to the exponent's bits: a NaN stays one.
        two_to_power = builder.add(exponent, self.same(_ONE_AS_BITS, VECTOR_I32))
        whole = builder.fmul(small, builder.bitcast(two_to_power, VECTOR))
        too_small = builder.fcmp_ordered("<", x, self.same(_EXP_MIN))
        return builder.select(too_small, self.same(0.0), whole)

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
            swapped = ir.Constant(VECTOR_I32, [lane ^ stride for lane in range(LANES)])
            vector = self.larger(vector, self.builder.shuffle_vector(vector, vector, swapped))
        return self.builder.extract_element(vector, I32(0))

    def total(self, vector):
        """Sum of the lanes."""
        for stride in _STRIDES:
            vector = self._fold(vector, vector, stride)
        return self.builder.extract_element(vector, I32(0))

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
            self.builder.shuffle_vector(a, b, ir.Constant(VECTOR_I32, mask))
            for mask in (left, right)
        ]
        return self.builder.fadd(*shuffled)
