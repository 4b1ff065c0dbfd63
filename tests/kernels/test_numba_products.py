"""Sums of products of bytes: every way that this processor has, against integers."""

import ctypes

import numba
import numpy as np
import pytest
from numba import types
from numba.extending import intrinsic

from saap.kernels.codes.numba_products import WAYS, ByteProducts, available
from saap.kernels.cpu.emitter import LANES, VECTOR_I32, Emitter


def adder(way):
    @intrinsic
    def add(typing_context, total, values, weights):
        def codegen(context, builder, signature, args):
            emit = Emitter(builder)
            parts = [emit.load(place, VECTOR_I32) for place in args]
            emit.store(ByteProducts(emit, way).add(*parts), args[0])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), codegen

    @numba.cfunc(types.void(types.int64, types.int64, types.int64))
    def call(total, values, weights):
        add(total, values, weights)

    return call


def late_adder(way, times, largest):
    """Adds `values . weights` so many times, all in one block."""

    @intrinsic
    def add(typing_context, total, values, weights):
        def codegen(context, builder, signature, args):
            emit = Emitter(builder)
            products = ByteProducts(emit, way)
            total, values, weights = (emit.load(place, VECTOR_I32) for place in args)
            slot = emit.register(total)
            for _ in range(times):
                products.add_late(slot, values, weights, largest)
            products.settle()
            emit.store(builder.load(slot), args[0])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), codegen

    @numba.cfunc(types.void(types.int64, types.int64, types.int64))
    def call(total, values, weights):
        add(total, values, weights)

    return call


@pytest.mark.parametrize("largest", [1, 3, 15])
@pytest.mark.parametrize("way", WAYS)
def test_late_sums_never_leave_their_bits(way, largest):
    if way not in available():
        pytest.skip(f"this processor has no {way}")
    times = 40
    call = late_adder(way, times, largest)
    for weight in (-127, 127, 3):
        values = np.full((LANES, 4), largest, np.uint8)
        weights = np.full((LANES, 4), weight, np.int8)
        total = np.arange(LANES, dtype=np.int32)
        expected = total + times * 4 * largest * weight
        ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(call.address)(
            total.ctypes.data, values.ctypes.data, weights.ctypes.data
        )
        assert (total == expected).all()


@pytest.mark.parametrize("way", WAYS)
def test_sums_of_products(way):
    if way not in available():
        pytest.skip(f"this processor has no {way}")
    call = adder(way)
    generator = np.random.default_rng(0)
    for high in (1, 15):
        values = generator.integers(0, high + 1, (LANES, 4), dtype=np.uint8)
        weights = generator.choice(np.array([-127, 127, -1, 0, 5], np.int8), (LANES, 4))
        total = generator.integers(-1000, 1000, LANES, dtype=np.int32)
        expected = total + (values.astype(int) * weights.astype(int)).sum(1)
        ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(call.address)(
            total.ctypes.data, values.ctypes.data, weights.ctypes.data
        )
        assert (total == expected).all()
