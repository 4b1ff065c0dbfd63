"""Sums of products of bytes in vector registers: the instruction that a processor has for them."""

from typing import Any

import llvmlite.binding
from llvmlite import ir

from saap.kernels.cpu.emitter import LANES, VECTOR, VECTOR_I32, Emitter

WAYS = ("vnni", "avx2", "plain")
"""AVX-512 VNNI; AVX2, by two instructions for products and for sums; 32-bit integers."""

_FEATURES = llvmlite.binding.get_host_cpu_features()
_BY_BYTES = llvmlite.binding.llvm_version_info[0] >= 22
"""LLVM declares vpdpbusd with vectors of bytes from then on, before with 32-bit integers."""

_I8, _I16 = ir.IntType(8), ir.IntType(16)
_AVX2_LANES = 8
_AVX2_VECTOR = ir.VectorType(ir.IntType(32), _AVX2_LANES)
_HALVES = ir.VectorType(_I16, 2 * _AVX2_LANES)
_LARGEST_WEIGHT, _LARGEST_SUM = 127, 2**15 - 1


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
        self._late: dict[int, tuple[Any, list, int]] = {}

    def as_floats(self, total):
        return self.emit.builder.sitofp(total, VECTOR)

    def add(self, total, values, weights):
        """`total + values . weights`; bytes of `values` are 0 to 31, of `weights` -127 to 127."""
        return getattr(self, f"_{self.way}")(total, values, weights)

    def add_late(self, slot, values, weights, largest: int):
        """`add` to the total in a register, which `settle` completes within the same block.

        largest: of the bytes of `values`. AVX2 sums up 16-bit products as long as they fit.
        """
        builder = self.emit.builder
        if self.way != "avx2":
            builder.store(self.add(builder.load(slot), values, weights), slot)
            return
        pairs, bound = self._pairs(values, weights), 2 * largest * _LARGEST_WEIGHT
        held = self._late.get(id(slot))
        if held is not None and held[2] + bound > _LARGEST_SUM:
            self._settle(slot)
            held = None
        if held is not None:
            pairs = [builder.add(a, b) for a, b in zip(held[1], pairs, strict=True)]
            bound += held[2]
        self._late[id(slot)] = slot, pairs, bound

    def settle(self):
        """Complete what `add_late` added."""
        for slot, _, _ in list(self._late.values()):
            self._settle(slot)

    def _settle(self, slot):
        builder = self.emit.builder
        _, pairs, _ = self._late.pop(id(slot))
        builder.store(builder.add(builder.load(slot), self._joined(pairs)), slot)

    def _vnni(self, total, values, weights):
        builder = self.emit.builder
        if _BY_BYTES:
            as_bytes = ir.VectorType(_I8, 4 * LANES)
            values, weights = (builder.bitcast(v, as_bytes) for v in (values, weights))
        return self.emit.call("llvm.x86.avx512.vpdpbusd.512", VECTOR_I32, total, values, weights)

    def _avx2(self, total, values, weights):
        """No sum of two products leaves 16 bits: values are at most 31."""
        return self.emit.builder.add(total, self._joined(self._pairs(values, weights)))

    def _pairs(self, values, weights) -> list:
        """Sums of two products, 16 bits each, by registers of AVX2."""
        builder, bytes_ = self.emit.builder, ir.VectorType(_I8, 4 * _AVX2_LANES)
        sums = []
        for first in range(0, LANES, _AVX2_LANES):
            mask = ir.Constant(_AVX2_VECTOR, list(range(first, first + _AVX2_LANES)))
            parts = [builder.shuffle_vector(v, v, mask) for v in (values, weights)]
            parts = [builder.bitcast(part, bytes_) for part in parts]
            sums.append(self.emit.call("llvm.x86.avx2.pmadd.ub.sw", _HALVES, *parts))
        return sums

    def _joined(self, pairs: list):
        """32-bit sums of neighbours."""
        ones = ir.Constant(_HALVES, [1] * (2 * _AVX2_LANES))
        name = "llvm.x86.avx2.pmadd.wd"
        sums = [self.emit.call(name, _AVX2_VECTOR, own, ones) for own in pairs]
        if len(sums) == 2:
            mask = ir.Constant(VECTOR_I32, list(range(LANES)))
            sums = [self.emit.builder.shuffle_vector(*sums, mask)]
        return sums[0]

    def _plain(self, total, values, weights):
        builder, same = self.emit.builder, self.emit.same
        for byte in range(4):
            value = builder.lshr(values, same(8 * byte, VECTOR_I32))
            value = builder.and_(value, same(255, VECTOR_I32))
            weight = builder.shl(weights, same(24 - 8 * byte, VECTOR_I32))
            weight = builder.ashr(weight, same(24, VECTOR_I32))
            total = builder.add(total, builder.mul(value, weight))
        return total
