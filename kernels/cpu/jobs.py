"""A job: what one call of a kernel works on, the same memory for ctypes and for Numba."""

import ctypes
from collections.abc import Sequence

import numba
import numpy as np
from numba import types


def job_type(fields: Sequence[str], scalars: Sequence[str]) -> tuple[type, types.Type]:
    """A ctypes structure of int64 `fields` and then float64 `scalars`, and the signature of a
    Numba function that takes the address of one."""
    layout = [(name, "i8") for name in fields] + [(name, "f8") for name in scalars]
    record = numba.from_dtype(np.dtype(layout))
    members = [(name, ctypes.c_int64) for name in fields]
    members += [(name, ctypes.c_double) for name in scalars]
    structure = type("Job", (ctypes.Structure,), {"_fields_": members})
    return structure, types.void(types.CPointer(record))


def offset_of(fields: Sequence[str], name: str) -> int:
    """Bytes from a job's address to this field."""
    return 8 * list(fields).index(name)
