"""Sums of products of bytes in vector registers: the instruction that a processor has for them."""

import llvmlite.binding
from llvmlite import ir

from saap.kernels.cpu.emitter import LANES, VECTOR, VECTOR_I32, Emitter

WAYS = ("vnni", "avx2", "plain")
"""AVX-512 VNNI; AVX2, by two instructions for products and for sums; 32-bit integers."""

_FEATURES = llvmlite.binding.get_host_cpu_features()
_BY_BYTES = llvmlite.binding.llvm_version_info[0] >= 22
"""LLVM declares vpdpbusd with vectors of bytes from then on, before with 32-bit integers."""

_I8, _I16 = ir.IntType(8), ir.IntType(16)


def available() -> tuple[str, ...]:
    """The ways that this processor has, best first."""
    has = {
        "vnni": LANES == 16 and bool(_FEATURES.get("avx512vnni")),
        "avx2": bool(_FEATURES.get("avx2")),
        "plain": True,
    }
    return tuple(way for way in WAYS if has[way])


class ByteProducts:
    """Each lane of a total gets the sum of the products of four bytes."""

    def __init__(self, emit: Emitter, way: str | None = None):
        self.emit, self.way = emit, way or available()[0]
        self.zero = ir.Constant(VECTOR_I32, [0] * LANES)

    def as_floats(self, total):
        return self.emit.builder.sitofp(total, VECTOR)

    def add(self, total, values, weights):
        """`total + values . weights`; bytes of `values` are 0 to 15, of `weights` -127 to 127."""
        return getattr(self, f"_{self.way}")(total, values, weights)

    def _vnni(self, total, values, weights):
        builder = self.emit.builder
        if _BY_BYTES:
            as_bytes = ir.VectorType(_I8, 4 * LANES)
            values, weights = (builder.bitcast(v, as_bytes) for v in (values, weights))
        return self.emit.call("llvm.x86.avx512.vpdpbusd.512", VECTOR_I32, total, values, weights)

    def _avx2(self, total, values, weights):
        """No sum of two products leaves 16 bits: values are at most 15."""
        builder = self.emit.builder
        size = 8
        bytes_, halves = ir.VectorType(_I8, 4 * size), ir.VectorType(_I16, 2 * size)
        part_type = ir.VectorType(ir.IntType(32), size)
        ones = ir.Constant(halves, [1] * (2 * size))
        sums = []
        for first in range(0, LANES, size):
            mask = ir.Constant(part_type, list(range(first, first + size)))
            parts = [builder.shuffle_vector(v, v, mask) for v in (values, weights)]
            parts = [builder.bitcast(part, bytes_) for part in parts]
            pairs = self.emit.call("llvm.x86.avx2.pmadd.ub.sw", halves, *parts)
            sums.append(self.emit.call("llvm.x86.avx2.pmadd.wd", part_type, pairs, ones))
        if len(sums) == 2:
            mask = ir.Constant(VECTOR_I32, list(range(LANES)))
            sums = [builder.shuffle_vector(*sums, mask)]
        return builder.add(total, sums[0])

    def _plain(self, total, values, weights):
        builder, same = self.emit.builder, self.emit.same
        for byte in range(4):
            value = builder.lshr(values, same(8 * byte, VECTOR_I32))
            value = builder.and_(value, same(255, VECTOR_I32))
            weight = builder.shl(weights, same(24 - 8 * byte, VECTOR_I32))
            weight = builder.ashr(weight, same(24, VECTOR_I32))
            total = builder.add(total, builder.mul(value, weight))
        return total
