"""`coding.encode` on a CPU, a key at a time: as fast for the few that join a context's middle at
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

from .coding import COARSE_COST, COARSE_GAINS, LARGEST_CORRECTION, SIZES
from .layout import (
    BYTES,
    COARSE,
    COARSE_PLACE,
    COARSE_STEPS,
    COARSE_ZEROS,
    FINE,
    FINE_PLANES,
    GROUPS,
    PER_WORD,
    SCALE_BASE,
    SCALE_SHIFT,
    WHOLE_STEPS,
    WHOLE_ZEROS,
    Codes,
)
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
_LARGEST_CORRECTION = np.float32(LARGEST_CORRECTION)
_TINY = np.float32(torch.finfo(torch.float32).tiny)
_SIZES, _COST = np.array(SIZES, "f4"), np.float32(COARSE_COST)
_STEPS, _ZEROS, _COARSE_STEPS, _COARSE_ZEROS, _GAINS = (
    np.array(own, "f4")
    for own in (WHOLE_STEPS, WHOLE_ZEROS, COARSE_STEPS, COARSE_ZEROS, COARSE_GAINS)
)
# Of each part: plane, bit, bits, group, four, place.
_PARTS = np.array(
    [(plane, *part) for plane, parts in enumerate((COARSE, *FINE)) for part in parts], "i4"
)

_njit = numba.njit(error_model="numpy")


def limit(x: Tensor) -> str | None:
    """What of validated arguments this backend cannot do, or None."""
    return None if x.device.type == "cpu" else f"impl 'numba' needs the CPU; got x on {x.device}"


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
    levels, kept = np.empty((2, job.coordinates), np.int32)
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
            scale = _levels(x, weight, own, levels, kept)
            stored = carray(uint8_pointer(job.scale + head * job.scale_head), job.rows)
            stored[row] = scale
            coarse = job.coarse + head * job.coarse_head + 4 * row
            _pack(kept, job.coordinates, coarse, job.coarse_plane,
                  job.fine + head * job.fine_head + row * job.fine_row)  # fmt: skip


@_njit
def _levels(x, weight, own, levels, kept):
    """Codes of a key's coordinates, to `kept`, and the byte of its scale."""
    n = len(x)
    size = n // GROUPS
    squares, total, usual = np.float32(0.0), np.float32(0.0), np.float32(0.0)
    for group in range(GROUPS):
        for d in range(group * size, (group + 1) * size):
            value = x[d] if abs(x[d]) < np.inf else np.float32(0.0)  # NaN, too
            own[d] = value
            squares += value * value * weight[d]
            total += weight[d]
            usual += _GAINS[group] * weight[d]
    length = np.float32(np.sqrt(squares / total))
    divisor = max(length, _TINY)
    squares = np.float32(0.0)
    for d in range(n):
        own[d] /= divisor
        squares += own[d] * own[d] * weight[d]
    best, best_match = np.float32(0.0), np.float32(0.0)
    for i in range(len(_SIZES)):
        match, cost = _round(own, weight, _SIZES[i], squares, usual / total, levels)
        if i == 0 or cost < best:
            best, best_match = cost, match
            for d in range(n):
                kept[d] = levels[d]
    correction = squares / max(best_match, _TINY)
    scale = length * min(correction, _LARGEST_CORRECTION)
    bits = np.int64(np.float32(scale).view(np.int32))
    byte = (bits + (1 << (SCALE_SHIFT - 1)) - SCALE_BASE) >> SCALE_SHIFT
    return np.uint8(min(max(byte, 0), 255))


@_njit
def _round(own, weight, multiple, squares, usual, levels):
    """Codes of a key at one of `SIZES`; its inner product with what they stand for; their cost."""
    size = len(own) // GROUPS
    match, norm, said = np.float32(0.0), np.float32(0.0), np.float32(0.0)
    for group in range(GROUPS):
        step, zero = _STEPS[group], _ZEROS[group]
        most = zero + zero
        for d in range(group * size, (group + 1) * size):
            level = own[d] * multiple / step + zero
            level = nearest(min(max(level, np.float32(0.0)), most))
            levels[d] = np.int32(level)
            stands_for = (level - zero) * step
            match += stands_for * own[d] * weight[d]
            norm += stands_for * stands_for * weight[d]
        if _COARSE_STEPS[group] == 0:
            continue
        for d in range(group * size, (group + 1) * size):
            coarse = np.float32(levels[d] >> COARSE_PLACE) - _COARSE_ZEROS[group]
            said += coarse * _COARSE_STEPS[group] * own[d] * weight[d]
    error = np.float32(1.0) - match * match / max(norm * squares, _TINY)
    apart = said / max(match, _TINY) / usual - np.float32(1.0)
    return match, error + _COST * apart * apart


@_njit
def _pack(levels, coordinates, coarse, coarse_plane, fine):
    """Words as `layout` says."""
    size = coordinates // GROUPS
    n_words = size // PER_WORD
    words = carray(int32_pointer(fine), FINE_PLANES * n_words)
    for w in range(n_words):
        plane, word = np.int32(0), np.uint32(0)
        for i in range(len(_PARTS)):
            own, bit, bits, group, four, place = _PARTS[i]
            if own != plane:
                _store(word, plane, w, n_words, coarse, coarse_plane, words)
                plane, word = own, np.uint32(0)
            first = group * size + w * PER_WORD + four * BYTES
            for j in range(BYTES):
                code = (levels[first + j] >> place) & ((1 << bits) - 1)
                word |= np.uint32(code) << np.uint32(8 * j + bit)
        _store(word, plane, w, n_words, coarse, coarse_plane, words)


@_njit
def _store(word, plane, w, n_words, coarse, coarse_plane, words):
    if plane == 0:
        carray(int32_pointer(coarse + w * coarse_plane), 1)[0] = np.int32(word)
    else:
        words[(plane - 1) * n_words + w] = np.int32(word)


@functools.cache
def _function() -> Callable:
    stamp = stamp_of(Path(__file__).parent)
    return compiled("coding of keys", _SIGNATURE, [_entry(stamp)])[0]
