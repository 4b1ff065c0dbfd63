"""Queries of a choice: in the coordinates of the codes, then in bytes."""

import numba
import numpy as np
from numba import carray

from saap.kernels.cpu.memory import (
    float32_pointer,
    int8_pointer,
    int16_pointer,
)

from .layout import (
    COARSE_STEPS,
    COARSE_ZEROS,
    GROUPS,
    QUERY_MAX,
    WHOLE_STEPS,
    WHOLE_ZEROS,
)

_njit = numba.njit(error_model="numpy")

# Of the coarse and of the whole code: steps in each group of coordinates, and the code for 0.
_STEPS = np.array([COARSE_STEPS, WHOLE_STEPS], "f4")
_ZEROS = np.array([COARSE_ZEROS, WHOLE_ZEROS], "f4")

_ROUNDER = np.float32(1.5 * 2**23)


@_njit
def nearest(x):
    """The whole number, float32 below 2 ** 22, to even at halves: unlike `np.rint` no call."""
    return (x + _ROUNDER) - _ROUNDER


@_njit
def weights_at(job, task, whole):
    """Addresses of a task's rounded queries, of their offsets and of their factors."""
    number = 2 * task + whole
    weights = job.weights + number * job.group * job.coordinates
    offsets = job.factors + number * job.group * 8
    return weights, offsets, offsets + 4 * job.group


@_njit
def prepare(job, task, first, end):
    """All that the other steps need of a task's queries, heads `first` to `end`."""
    if job.map:
        _map(job, task, first, end)
    _round(job, task, first, end)


@_njit
def _map(job, task, first, end):
    """`QueryMap` of queries, whose rows are read once for all of them."""
    dim, coordinates = job.dim, job.coordinates
    b, kv_head = task // job.heads, task % job.heads * job.kv_heads // job.heads
    place = job.map + b * job.map_batch + job.map_bytes * kv_head * dim * coordinates
    narrow = carray(int8_pointer(place), (dim, coordinates))
    wide = carray(int16_pointer(place), (dim, coordinates))
    place = job.map_scale + b * job.map_scale_batch + 4 * kv_head * coordinates
    scale = carray(float32_pointer(place), coordinates)
    q = carray(float32_pointer(job.q + 4 * task * job.group * dim), (job.group, dim))
    place = job.mapped + 4 * task * job.group * coordinates
    mapped = carray(float32_pointer(place), (job.group, coordinates))
    for g in range(first, end):
        for p in range(coordinates):
            mapped[g, p] = np.float32(0.0)
    for d in range(dim):
        for g in range(first, end):
            if job.map_bytes == 1:
                _add_scaled(mapped[g], q[g, d], narrow[d])
            else:
                _add_scaled(mapped[g], q[g, d], wide[d])
    for g in range(first, end):
        for p in range(coordinates):
            mapped[g, p] *= scale[p]


@numba.njit(error_model="numpy", inline="always")
def _add_scaled(out, factor, row):
    for p in range(len(out)):
        out[p] += factor * np.float32(row[p])


@_njit
def _round(job, task, first, end):
    q = carray(float32_pointer(job.mapped + 4 * task * job.group * job.coordinates),
               (job.group, job.coordinates))  # fmt: skip
    size = job.coordinates // GROUPS
    for whole in range(2):
        place, offset_place, factor_place = weights_at(job, task, whole)
        weights = carray(int8_pointer(place), (job.group, job.coordinates))
        offsets = carray(float32_pointer(offset_place), job.group)
        factors = carray(float32_pointer(factor_place), job.group)
        for g in range(first, end):
            largest = np.float32(0.0)
            for part in range(GROUPS):
                step = _STEPS[whole, part]
                for d in range(part * size, (part + 1) * size):
                    own = abs(q[g, d] * step)
                    largest = own if own > largest or np.isnan(own) else largest
            usable = largest > 0 and largest < np.inf
            factor = largest / np.float32(QUERY_MAX) if usable else np.float32(1.0)
            offset = np.float32(0.0)
            for part in range(GROUPS):
                step, total = _STEPS[whole, part], np.int32(0)
                for d in range(part * size, (part + 1) * size):
                    weight = nearest(q[g, d] * step / factor)
                    rounded = np.int32(weight) if usable else np.int32(0)
                    weights[g, d] = rounded
                    total += rounded
                offset += np.float32(total) * _ZEROS[whole, part]
            offsets[g], factors[g] = offset, factor
