"""The rows with the largest weights: candidates by the coarse code, then the best of them."""

import math

import numba
import numpy as np
from numba import carray

from saap.kernels.cpu.emitter import LANES
from saap.kernels.cpu.memory import (
    fetch_increment,
    float32_pointer,
    int32_pointer,
    int64_pointer,
    uint8_pointer,
)

from .numba_best import best, likely_below, mark_best
from .numba_job import (
    CHUNK,
    NEXT_TASK,
    NEXT_WORKER,
    blocks_of,
    chunk_bytes,
    place_of,
    planes_bytes,
    room_of,
)
from .numba_scan import bring, score, weigh_chunk
from .numba_simd import BLOCK, WIDEST
from .numba_vectors import (
    add_weighed,
    count_from,
    exponentials,
    places_from,
    places_of_marks,
    values_from,
)

_PER_BLOCK = BLOCK // LANES

_njit = numba.njit(error_model="numpy")


def entry(stamp):
    """C function to compile; `stamp` becomes a part of the cache's key."""

    def choose_entry(jobs):
        _ = stamp
        _work(carray(jobs, 1))

    return choose_entry


@_njit
def _work(jobs):
    """`by_task`: the rows of a task are scored here, before it is chosen from; else they were.

    `least_weight`: the bits of the least weight, a float32, of a row that is chosen; 0 for any.
    """
    job = jobs[0]
    counters = jobs.ctypes.data
    worker = fetch_increment(counters + NEXT_WORKER)
    space = job.workspace + job.worker_bytes * worker
    counts = carray(int64_pointer(job.counts), job.tasks)
    scored = carray(int64_pointer(job.scored), job.tasks)
    while True:
        task = fetch_increment(counters + NEXT_TASK)
        if task >= job.tasks:
            break
        held = worker if job.by_task else task
        if job.by_task and not takes_all(job, place_of(job, task)[2]):
            for chunk in range(job.chunks):
                weigh_chunk(job, task, chunk, held, space)
        counts[task], scored[task] = _choose(job, task, held, space)


@_njit
def _choose(job, task, held, space):
    """Write the ranges of a task; returns how many, and of how many rows all was read."""
    b, kv_head, n = place_of(job, task)
    room = job.chunks * CHUNK
    keys = space + chunk_bytes(job.coordinates)
    marks = keys + 4 * room
    places = marks + room // 8
    listed = places + 4 * (room + LANES)
    factors = listed + 4 * (room + LANES)
    weights = factors + 4 * job.group * (job.chunks + 1)
    kept, scored = min(job.max_tokens, n), np.int64(0)
    if takes_all(job, n):
        list_all(n, places)
    elif job.whole:
        _weigh_chunks(job, task, held, n, factors)
        for chunk in range((n + CHUNK - 1) // CHUNK):
            place = job.scores + 4 * (held * job.group * room + chunk * CHUNK)
            length = min(CHUNK, n - chunk * CHUNK)
            add_weighed(place, 4 * room, job.group, factors + 4 * chunk, 4 * job.chunks,
                        blocks_of(length) * _PER_BLOCK, keys + 4 * CHUNK * chunk)  # fmt: skip
        kept = best_of(job, keys, n, places, 0)
        scored = n
    else:
        scored = _candidates(job, held, n, marks, places, listed)
        _weigh(job, task, b, kv_head, scored, space, listed, weights, factors, keys)
        kept = best_of(job, keys, scored, places, listed)
    return write_ranges(job, task, places, kept), scored


@_njit
def takes_all(job, n):
    """Whether every one of n rows is chosen, whatever it weighs."""
    return job.max_tokens >= n and job.least_weight == 0


@_njit
def list_all(n, places):
    rows = carray(int32_pointer(places), n)
    for i in range(n):
        rows[i] = i


@_njit
def write_ranges(job, task, places, kept):
    """The chosen rows, ascending, as ranges; returns how many."""
    rows = carray(int32_pointer(places), kept)
    place = task // job.heads * job.out_batch + task % job.heads * job.out_head
    starts = carray(int32_pointer(job.starts + place), job.capacity)
    lengths = carray(int32_pointer(job.lengths + place), job.capacity)
    last, first, end = np.int64(-1), np.int64(0), np.int64(-1)
    for i in range(kept):  # without a branch, which would be mispredicted every other time
        row = np.int64(rows[i])
        last += row != end
        first = first if row == end else row
        starts[last], lengths[last] = job.first_row + first, row - first + 1
        end = row + 1
    found = last + 1
    for i in range(found, job.capacity):
        starts[i] = lengths[i] = 0
    return found


@_njit
def best_of(job, weights, n, out, names):
    """The rows that weigh most, as many as are asked for and weigh enough; returns how many.

    names: what to call them, int32; 0: by their numbers.
    """
    kept = min(job.max_tokens, n)
    if job.least_weight == 0:
        best(weights, n, kept, out, names)
        return kept
    vectors = blocks_of(n) * _PER_BLOCK
    enough = count_from(weights, vectors, job.least_weight)
    if enough > kept:
        best(weights, n, kept, out, names)
        return kept
    if names:
        return values_from(weights, names, vectors, job.least_weight, out)
    return places_from(weights, vectors, job.least_weight, out)


@_njit
def _outside(job, task, g, largest):
    """What is visited in any case, beside a row of the largest score, whose weight is 1."""
    if job.outside == 0:
        return np.float32(0.0)
    own = carray(float32_pointer(job.outside + 4 * (task * job.group + g)), 1)[0]
    weight = np.float32(math.exp(own - largest))
    return weight if weight >= 0 else np.float32(0.0)  # NaN


@_njit
def _weigh_chunks(job, task, held, n, factors):
    """What each chunk's weights count by, for a softmax over all rows of each head."""
    n_chunks = (n + CHUNK - 1) // CHUNK
    place = 4 * held * job.group * job.chunks
    shape = (job.group, job.chunks)
    maxima = carray(float32_pointer(job.maxima + place), shape)
    totals = carray(float32_pointer(job.totals + place), shape)
    factor = carray(float32_pointer(factors), shape)
    for g in range(job.group):
        largest = maxima[g, 0]
        for chunk in range(1, n_chunks):
            largest = max(largest, maxima[g, chunk])
        total = 0.0
        for chunk in range(n_chunks):
            share = math.exp(maxima[g, chunk] - largest)
            factor[g, chunk] = share
            total += share * totals[g, chunk]
        total += _outside(job, task, g, largest)
        for chunk in range(n_chunks):
            factor[g, chunk] /= np.float32(total)


@_njit
def _candidates(job, held, n, marks, places, listed):
    """Each head's `job.candidates` best rows by the coarse code, together; returns how many.

    Each has its own, since coarse scores err by a share of how far a head's scores are apart:
    among all heads' rows, a peaked head's would lose to those of flat ones.
    """
    if job.candidates >= n:
        list_all(n, listed)
        return n
    room = job.chunks * CHUNK
    vectors = blocks_of(n) * _PER_BLOCK
    bits = carray(uint8_pointer(marks), room // 8)
    for i in range(vectors * LANES // 8):
        bits[i] = 0
    for g in range(job.group):
        keys = job.scores + 4 * (held * job.group + g) * room
        low = likely_below(keys, n, job.candidates, places)
        mark_best(keys, n, job.candidates, low, bits, places)
    return places_of_marks(marks, vectors, listed)


@_njit
def _weigh(job, task, b, kv_head, found, space, listed, weights, factors, keys):
    """The sum of the heads' softmax over the listed rows, by all of their code."""
    room = room_of(found)
    candidates = carray(int32_pointer(listed), found)
    factor = carray(float32_pointer(factors), job.group)
    maximum = carray(float32_pointer(factors + 4 * job.group), job.group)
    for g in range(job.group):
        factor[g] = -np.inf
    for first in range(0, found, CHUNK):
        last = min(first + CHUNK, found)
        score_listed(job, task, b, kv_head, candidates[first:last], space, weights + 4 * first,
                     room, factors + 4 * job.group, 4)  # fmt: skip
        for g in range(job.group):
            factor[g] = max(factor[g], maximum[g])
    sum_of_softmax(job, task, found, weights, room, factors, keys)


@_njit
def score_listed(job, task, b, kv_head, listed, space, weights, room, maxima, maximum_bytes):
    """Each head's scores of up to `CHUNK` rows by all of their code, `room` floats apart from head
    to head, and the largest of each."""
    chunk_rows = carray(int32_pointer(space + planes_bytes(job.coordinates)), CHUNK)
    length = len(listed)
    for i in range(length):
        chunk_rows[i] = listed[i]
    bring(job, b, kv_head, length, 1, space)
    for g in range(0, job.group, WIDEST):
        score(job, task, g, length, 1, space, weights + 4 * g * room, 4 * room,
              maxima + maximum_bytes * g, maximum_bytes)  # fmt: skip


@_njit
def sum_of_softmax(job, task, found, weights, room, factors, out):
    """The sum of the heads' softmax over `found` scores; `factors`: each head's largest, float32,
    in whose place its factor comes. `out` may be `weights`."""
    factor = carray(float32_pointer(factors), job.group)
    vectors = blocks_of(found) * _PER_BLOCK
    for g in range(job.group):
        total = exponentials(weights + 4 * g * room, vectors, factor[g])
        total += _outside(job, task, g, factor[g])
        factor[g] = np.float32(1.0) / total
    add_weighed(weights, 4 * room, job.group, factors, 4, vectors, out)
