"""`layout.encode` on a CPU, a key at a time: as fast for the few that join a context's middle at
a time as for all of a prompt."""

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
from saap.kernels.cpu.memory import (
    fetch_increment,
    float32_pointer,
    int32_pointer,
    uint8_pointer,
)

from .layout import PER_WORD, SCALE_BASE, SCALE_SHIFT, STEP_2, STEP_4, Codes
from .numba_queries import nearest

_FIELDS = (
    "x importance coarse fine scale "  # addresses; the last three of the first row
    "heads rows coordinates "
    "x_head coarse_head coarse_plane fine_head fine_row scale_head "  # bytes
    "next_task"
).split()
_NEXT_TASK = offset_of(_FIELDS, "next_task")
_Job, _SIGNATURE = job_type(_FIELDS, ("unused",))

_AT_ONCE = 256  # rows of a task
_LARGEST_CORRECTION = np.float32(4.0)  # of a key's scale
_TINY = np.float32(torch.finfo(torch.float32).tiny)
_STEP_4, _STEP_2 = np.float32(STEP_4), np.float32(STEP_2)

_njit = numba.njit(error_model="numpy")


def encode_rows(x: Tensor, importance: Tensor, codes: Codes, sequence: int, first: int) -> None:
    """As `coding.encode_rows`, whose checks are taken for granted."""
    x, importance = (t.detach().resolve_neg().contiguous() for t in (x, importance))
    heads, n, coordinates = x.shape
    coarse, fine, scale = (t[sequence] for t in (codes.coarse, codes.fine, codes.scale))
    job = _Job(
        x=x.data_ptr(), importance=importance.data_ptr(),
        coarse=coarse[:, :, first:].data_ptr(), fine=fine[:, first:].data_ptr(),
        scale=scale[:, first:].data_ptr(),
        heads=heads, rows=n, coordinates=coordinates, x_head=4 * x.stride(0),
        coarse_head=4 * coarse.stride(0), coarse_plane=4 * coarse.stride(1),
        fine_head=4 * fine.stride(0), fine_row=4 * fine.stride(1), scale_head=scale.stride(0),
    )  # fmt: skip
    tasks = heads * -(-n // _AT_ONCE)
    run(_function(), ctypes.addressof(job), min(torch.get_num_threads(), tasks))


def _entry(stamp):
    """C function to compile; `stamp` becomes a part of the cache's key."""

    def encode_entry(jobs):
        _ = stamp
        _work(carray(jobs, 1))

    return encode_entry


@_njit
def _work(jobs):
    job = jobs[0]
    counters = jobs.ctypes.data
    per_head = (job.rows + _AT_ONCE - 1) // _AT_ONCE
    own = np.empty(job.coordinates, np.float32)
    levels = np.empty(job.coordinates, np.int32)
    while True:
        task = fetch_increment(counters + _NEXT_TASK)
        if task >= job.heads * per_head:
            break
        head, first = task // per_head, task % per_head * _AT_ONCE
        weight = carray(float32_pointer(job.importance + 4 * head * job.coordinates),
                        job.coordinates)  # fmt: skip
        for row in range(first, min(first + _AT_ONCE, job.rows)):
            x = carray(float32_pointer(job.x + head * job.x_head + 4 * row * job.coordinates),
                       job.coordinates)  # fmt: skip
            scale = _levels(x, weight, own, levels)
            stored = carray(uint8_pointer(job.scale + head * job.scale_head), job.rows)
            stored[row] = scale
            coarse = job.coarse + head * job.coarse_head + 4 * row
            _pack(levels, job.coordinates, coarse, job.coarse_plane,
                  job.fine + head * job.fine_head + row * job.fine_row)  # fmt: skip


@_njit
def _levels(x, weight, own, levels):
    """Codes of a key's coordinates, and the byte of its scale."""
    n = len(x)
    half = n // 2
    squares, total = np.float32(0.0), np.float32(0.0)
    for d in range(n):
        value = x[d] if abs(x[d]) < np.inf else np.float32(0.0)  # NaN, too
        own[d] = value
        squares += value * value * weight[d]
        total += weight[d]
    length = np.float32(np.sqrt(squares / total))
    divisor = max(length, _TINY)
    squares, match = np.float32(0.0), np.float32(0.0)
    for d in range(n):
        value = own[d] / divisor
        if d < half:
            step, middle, most = _STEP_4, np.float32(7.5), np.float32(15.0)
        else:
            step, middle, most = _STEP_2, np.float32(1.5), np.float32(3.0)
        level = min(max(value / step + middle, np.float32(0.0)), most)
        level = nearest(level)
        levels[d] = np.int32(level)
        squares += value * value * weight[d]
        match += (level - middle) * step * value * weight[d]
    correction = squares / max(match, _TINY)
    scale = length * min(correction, _LARGEST_CORRECTION)
    bits = np.int64(np.float32(scale).view(np.int32))
    byte = (bits + (1 << (SCALE_SHIFT - 1)) - SCALE_BASE) >> SCALE_SHIFT
    return np.uint8(min(max(byte, 0), 255))


@_njit
def _pack(levels, coordinates, coarse, coarse_plane, fine):
    """Words as `layout` says: code j of a word in byte j % 4, those of 2 bits from bit 2 (j // 4)
    on, single bits as bit j // 4, of the second of two groups four bits further."""
    group = coordinates // 4
    n_words = group // PER_WORD
    words = carray(int32_pointer(fine), 4 * n_words)
    for w in range(n_words):
        upper = signs = lower = middle = last = fourth = np.uint32(0)
        for j in range(PER_WORD):
            byte, place = 8 * (j % 4), j // 4
            first = np.uint32(levels[w * PER_WORD + j])
            second = np.uint32(levels[group + w * PER_WORD + j])
            third = np.uint32(levels[2 * group + w * PER_WORD + j])
            upper |= (first >> 2) << (byte + 2 * place)
            lower |= (first & 3) << (byte + 2 * place)
            middle |= (second >> 1 & 3) << (byte + 2 * place)
            fourth |= np.uint32(levels[3 * group + w * PER_WORD + j]) << (byte + 2 * place)
            signs |= (second >> 3) << (byte + place) | (third >> 1) << (byte + place + 4)
            last |= (second & 1) << (byte + place) | (third & 1) << (byte + place + 4)
        carray(int32_pointer(coarse + w * coarse_plane), 1)[0] = np.int32(upper)
        carray(int32_pointer(coarse + (n_words + w) * coarse_plane), 1)[0] = np.int32(signs)
        words[w] = np.int32(lower)
        words[n_words + w] = np.int32(middle)
        words[2 * n_words + w] = np.int32(last)
        words[3 * n_words + w] = np.int32(fourth)


@functools.cache
def _function() -> Callable:
    stamp = stamp_of(Path(__file__).parent)
    return compiled("coding of keys", _SIGNATURE, [_entry(stamp)])[0]
