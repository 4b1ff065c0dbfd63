"""Scores of a choice's queries with rows that attention visits in any case."""

import math

import numba
import numpy as np
from numba import carray

from saap.kernels.cpu.memory import float32_pointer, int32_pointer

from .numba_job import place_of

_njit = numba.njit(error_model="numpy")


@_njit
def lse_beside(job, task, g):
    """Their log-sum-exp, as codes count scores: less what the mean adds to every key's."""
    b, kv_head, _ = place_of(job, task)
    q = carray(float32_pointer(job.q + 4 * (task * job.group + g) * job.dim), job.dim)
    place = 4 * job.beside_ranges * (task // job.heads * job.kv_heads + kv_head)
    starts = carray(int32_pointer(job.beside_starts + place), job.beside_ranges)
    lengths = carray(int32_pointer(job.beside_lengths + place), job.beside_ranges)
    rows = job.beside + b * job.beside_batch + kv_head * job.beside_head
    largest, total = np.float32(-np.inf), np.float32(0.0)
    for r in range(job.beside_ranges):
        first, end = np.int64(starts[r]), np.int64(starts[r]) + lengths[r]
        for row in range(max(0, first), min(end, job.beside_rows)):
            key = carray(float32_pointer(rows + row * job.beside_row), job.dim)
            score = np.float32(job.sm_scale) * _product(q, key)
            if score > largest:
                total = total * np.float32(math.exp(largest - score)) + np.float32(1.0)
                largest = score
            else:
                total += np.float32(math.exp(score - largest))
    place = job.mean + b * job.mean_batch + 4 * kv_head * job.dim
    shift = np.float32(job.sm_scale) * _product(q, carray(float32_pointer(place), job.dim))
    return largest + np.float32(math.log(total)) - shift


@numba.njit(error_model="numpy", fastmath={"reassoc", "contract"})
def _product(a, b):
    total = np.float32(0.0)
    for d in range(len(a)):
        total += a[d] * b[d]
    return total
