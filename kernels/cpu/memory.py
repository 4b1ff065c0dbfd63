"""Memory by address, in Numba: jobs hold addresses, so that strides need no signature of their
own."""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


def _pointer_to(numba_type):
    @intrinsic
    def pointer(typing_context, address):
        def codegen(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(numba_type)(types.int64), codegen

    return pointer


float32_pointer = _pointer_to(types.float32)
float64_pointer = _pointer_to(types.float64)
int32_pointer = _pointer_to(types.int32)
int64_pointer = _pointer_to(types.int64)
int8_pointer = _pointer_to(types.int8)
int16_pointer = _pointer_to(types.int16)
uint8_pointer = _pointer_to(types.uint8)
uint16_pointer = _pointer_to(types.uint16)


@intrinsic
def fetch_increment(typing_context, address):
    """`address[0] += 1`, atomically; returns the value before. Orders memory between threads."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, ir.IntType(64)(1), "acq_rel")

    return types.int64(types.int64), codegen


@intrinsic
def copy_bytes(typing_context, target, source, count):
    """Copy `count` bytes between places that do not overlap."""

    def codegen(context, builder, signature, args):
        byte = ir.IntType(8).as_pointer()
        places = [builder.inttoptr(place, byte) for place in args[:2]]
        cgutils.raw_memcpy(builder, *places, args[2], ir.IntType(64)(1))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen
