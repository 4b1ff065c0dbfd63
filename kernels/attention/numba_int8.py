"""`int8_rows.quantize_rows` on a CPU: one call for the token of a step, all cores for a prompt."""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np
import torch
from numba import carray
from torch import Tensor

from saap.kernels.cpu.functions import compiled, run, stamp_of
from saap.kernels.cpu.jobs import job_type, offset_of
from saap.kernels.cpu.memory import fetch_increment, float32_pointer, int8_pointer

from .int8_rows import LARGEST

_FIELDS = "x out rows dim out_bytes next_task".split()  # out_bytes: of a row; no gaps in either
_NEXT_TASK = offset_of(_FIELDS, "next_task")
_Job, _SIGNATURE = job_type(_FIELDS, ("unused",))

_AT_ONCE = 1024  # rows of a task
_LARGEST = np.float32(LARGEST)
_MOST = np.float32(np.finfo(np.float32).max)

_njit = numba.njit(error_model="numpy")


def quantize_rows(numbers: Tensor, out: Tensor) -> None:
    """Rows of `numbers [..., D]`, float32, into `out [..., D + 4]`, new and without gaps."""
    numbers = numbers.detach().resolve_neg().contiguous()
    dim = numbers.shape[-1]
    rows = numbers.numel() // dim
    job = _Job(
        x=numbers.data_ptr(), out=out.data_ptr(), rows=rows, dim=dim, out_bytes=out.shape[-1]
    )
    workers = min(torch.get_num_threads(), -(-rows // _AT_ONCE))
    run(_function(), ctypes.addressof(job), workers)


def _entry(stamp):
    """C function to compile; `stamp` becomes a part of the cache's key."""

    def quantize_entry(jobs):
        _ = stamp
        _work(carray(jobs, 1))

    return quantize_entry


@_njit
def _work(jobs):
    job = jobs[0]
    counters = jobs.ctypes.data
    while True:
        first = fetch_increment(counters + _NEXT_TASK) * _AT_ONCE
        if first >= job.rows:
            break
        for row in range(first, min(first + _AT_ONCE, job.rows)):
            x = carray(float32_pointer(job.x + 4 * row * job.dim), job.dim)
            place = job.out + row * job.out_bytes
            stored = carray(int8_pointer(place), job.dim)
            scale = carray(float32_pointer(place + job.dim), 1)
            scale[0] = _quantize(x, stored)


@_njit
def _quantize(x, stored):
    """Writes a row's numbers in units of its scale, which is returned."""
    largest, finite = np.float32(0), True
    for number in x:
        size = abs(number)
        finite &= size <= _MOST  # neither NaN nor infinite
        largest = max(size, largest)
    if not finite:
        stored[:] = 0
        return np.float32(np.nan)
    scale = largest / _LARGEST
    unit = scale if scale > 0 else np.float32(1)
    for d in range(len(x)):
        stored[d] = np.int8(min(max(np.rint(x[d] / unit), -_LARGEST), _LARGEST))
    return scale


@functools.cache
def _function() -> Callable:
    stamp = stamp_of(Path(__file__).parent)
    return compiled("rows of eight bits", _SIGNATURE, [_entry(stamp)])[0]
