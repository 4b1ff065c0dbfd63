"""Memory that will be read soon, in Numba: asked for where no processor foresees it."""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .emitter import I32, I64, Emitter

_i64 = types.int64
_CACHE_LINE = 64


@intrinsic
def fetch_ahead(typing_context, address, n_bytes):
    """Ask for so many bytes that follow each other."""

    def codegen(context, builder, signature, args):
        emit = Emitter(builder)
        lines = builder.sdiv(args[1], I64(_CACHE_LINE))
        with cgutils.for_range(builder, lines) as line:
            emit.prefetch(emit.at(args[0], builder.mul(line.index, I64(_CACHE_LINE))))
        return context.get_dummy_value()

    return types.void(_i64, _i64), codegen


@intrinsic
def fetch_rows(typing_context, address, row_bytes, rows, count):
    """Ask for the first cache line of listed rows, int32 at `rows`."""

    def codegen(context, builder, signature, args):
        address, row_bytes, rows, count = args
        emit = Emitter(builder)
        with cgutils.for_range(builder, count) as loop:
            entry = emit.at(rows, builder.mul(loop.index, I64(4)))
            row = builder.zext(emit.load(entry, I32), ir.IntType(64))
            emit.prefetch(emit.at(address, builder.mul(row, row_bytes)))
        return context.get_dummy_value()

    return types.void(_i64, _i64, _i64, _i64), codegen
