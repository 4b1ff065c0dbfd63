"""Calls of C functions by address, in Numba.

A function that others call is compiled into each of them, and into each that calls those; called
by address it is compiled once.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


@intrinsic
def call(typing_context, address, arguments):
    """Call the function at `address` with a tuple of int64."""

    def codegen(context, builder, signature, args):
        of_each = signature.args[1].types
        values = [
            context.cast(builder, value, own, types.int64)
            for value, own in zip(cgutils.unpack_tuple(builder, args[1]), of_each, strict=True)
        ]
        function = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * len(values))
        builder.call(builder.inttoptr(args[0], function.as_pointer()), values)
        return context.get_dummy_value()

    return types.void(types.int64, arguments), codegen


def signature_of(count: int):
    """Of a function that `call` calls, with `count` arguments."""
    return types.void(*[types.int64] * count)
