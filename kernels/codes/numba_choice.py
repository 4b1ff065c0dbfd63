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

from .numba_job import (
    CHUNK,
    NEXT_TASK,
    NEXT_WORKER,
    blocks_of,
    chunk_bytes,
    place_of,
    planes_bytes,
)
from .numba_scan import bring, score, weigh_chunk
from .numba_simd import BLOCK, WIDEST
from .numba_vectors import (
    add_weighed,
    count_from,
    exponentials,
    mark_from,
    places_from,
    places_of_marks,
    values_from,
)

_PER_BLOCK = BLOCK // LANES
_OCTAVE = 1 << 23
_LEAST = -(2**31)
MOST_SAMPLED = 2048
"""Keys that a first threshold is guessed from."""

_njit = numba.njit(error_model="numpy")


def entry(stamp):
    """C function to compile; `stamp` becomes a part of the cache's key."""

    def choose_entry(jobs):
        _ = stamp
        _work(carray(jobs, 1))

    return choose_entry


@_njit
def _work(jobs):
    """`by_task`: the rows of a task are weighed here, before it is chosen from; else they were.

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
        every = job.max_tokens >= place_of(job, task)[2] and job.least_weight == 0
        if job.by_task and not every:
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
    rows = carray(int32_pointer(places), room + LANES)
    kept, scored = min(job.max_tokens, n), np.int64(0)
    if kept == n and job.least_weight == 0:
        for i in range(n):
            rows[i] = i
    elif job.whole:
        _weigh_chunks(job, task, held, n, factors)
        for chunk in range((n + CHUNK - 1) // CHUNK):
            place = job.scores + 4 * (held * job.group * room + chunk * CHUNK)
            length = min(CHUNK, n - chunk * CHUNK)
            add_weighed(place, 4 * room, job.group, factors + 4 * chunk, 4 * job.chunks,
                        blocks_of(length) * _PER_BLOCK, keys + 4 * CHUNK * chunk)  # fmt: skip
        kept = _best_of(job, keys, n, places, 0)
        scored = n
    else:
        found = _candidates(job, held, n, marks, places, listed)
        _weigh(job, task, b, kv_head, found, space, listed, weights, factors, keys)
        scored = found
        kept = _best_of(job, keys, found, places, listed)
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
    return found, scored


@_njit
def _best_of(job, weights, n, out, names):
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
        every = carray(int32_pointer(listed), n)
        for i in range(n):
            every[i] = i
        return n
    room = job.chunks * CHUNK
    vectors = blocks_of(n) * _PER_BLOCK
    bits = carray(uint8_pointer(marks), room // 8)
    for i in range(vectors * LANES // 8):
        bits[i] = 0
    for g in range(job.group):
        keys = job.scores + 4 * (held * job.group + g) * room
        low = _likely_below(keys, n, job.candidates, places)
        _mark_best(keys, n, job.candidates, low, bits, places)
    return places_of_marks(marks, vectors, listed)


@_njit
def _mark_best(keys, n, k, low, bits, space):
    """Set the bits of the k largest of n keys, 0 < k < n; of equal ones of the first. `low`,
    `space`: of `_threshold`."""
    vectors = blocks_of(n) * _PER_BLOCK
    least, count = _threshold(keys, n, k, low, np.int64(_LEAST), space)
    if count == k:
        mark_from(keys, vectors, least, bits.ctypes.data)
        return
    above = count_from(keys, vectors, least + 1)
    mark_from(keys, vectors, least + 1, bits.ctypes.data)
    equal, own = k - above, carray(int32_pointer(keys), n)
    for first in range(0, n, CHUNK):
        last = min(first + CHUNK, n)
        some = np.int64(0)
        for i in range(first, last):
            some += own[i] == least
        for i in range(first, last if some else first):
            if own[i] == least and equal > 0:
                bits[i >> 3] |= np.uint8(1 << (i & 7))
                equal -= 1


@_njit
def _likely_below(keys, n, k, space):
    """A number that at least k of the keys, and few more, reach: so says a sample of them.

    `_LEAST` where a sample says little. space: int32, room for the sample.
    """
    size = min(MOST_SAMPLED, n // 8 // BLOCK * BLOCK)
    expected = k * size / n
    rank = np.int64(expected + 3 * math.sqrt(expected)) + 4
    if rank >= size:
        return np.int64(_LEAST)
    step = n // size
    all_keys, sample = carray(int32_pointer(keys), n), carray(int32_pointer(space), size)
    for i in range(size):
        sample[i] = all_keys[i * step]
    low, high = np.int64(_LEAST), _largest(space, size) + 1
    while high - low > 1:
        middle = (low + high) // 2
        count = count_from(space, size // LANES, middle)
        if count < rank:
            high = middle
        else:
            low = middle
            if count < rank + rank // 8:
                break
    return low


@_njit
def _weigh(job, task, b, kv_head, found, space, listed, weights, factors, keys):
    """The sum of the heads' softmax over the listed rows, by all of their code."""
    room = (found + CHUNK - 1) // CHUNK * CHUNK
    chunk_rows = carray(int32_pointer(space + planes_bytes(job.coordinates)), CHUNK)
    candidates = carray(int32_pointer(listed), found)
    factor = carray(float32_pointer(factors), job.group)
    maximum = carray(float32_pointer(factors + 4 * job.group), job.group)
    for g in range(job.group):
        factor[g] = -np.inf
    for first in range(0, found, CHUNK):
        length = min(CHUNK, found - first)
        for i in range(length):
            chunk_rows[i] = candidates[first + i]
        bring(job, b, kv_head, length, 1, space)
        for g in range(0, job.group, WIDEST):
            score(job, task, g, length, 1, space, weights + 4 * (g * room + first), 4 * room,
                  factors + 4 * (job.group + g), 4)  # fmt: skip
        for g in range(job.group):
            factor[g] = max(factor[g], maximum[g])
    vectors = blocks_of(found) * _PER_BLOCK
    for g in range(job.group):
        total = exponentials(weights + 4 * g * room, vectors, factor[g])
        total += _outside(job, task, g, factor[g])
        factor[g] = np.float32(1.0) / total
    add_weighed(weights, 4 * room, job.group, factors, 4, vectors, keys)


@_njit
def best(weights, n, k, out, names):
    """The k largest of n weights, float32 not below 0, by their numbers, ascending; of equal ones
    the first. 0 < k <= n.

    weights: followed by such as are not above any of them, up to a whole block. out: int32, room
    for whole chunks and `LANES` more. names: int32 to call them by; 0: their numbers.
    """
    vectors = blocks_of(n) * _PER_BLOCK
    least, count = _threshold(weights, n, k, np.int64(0), np.int64(0), out)
    if count == k and names:
        values_from(weights, names, vectors, least, out)
        return
    found = places_from(weights, vectors, least, out)
    rows = carray(int32_pointer(out), found)
    if count != k:
        _first_of(weights, least, rows, k)
    if names:
        own = carray(int32_pointer(names), n)
        for i in range(k):
            rows[i] = own[rows[i]]


@_njit
def _threshold(keys, n, k, low, least, space):
    """A number that at least k of the keys reach, and fewer than k exceed; and how many reach it.

    It is looked for by halving the range of the keys; once few are left, these are brought
    together.

    keys: int32, followed by such as are not above any of them, up to a whole block; or weights,
    float32 not below 0, whose bits are in their order. least: what every key reaches, 0 for
    weights. low: a guess that at least k keys reach, and few more; where there are fewer it is not
    used. space: int32, room for whole chunks and `LANES` more.
    """
    searched, vectors = keys, blocks_of(n) * _PER_BLOCK
    room = (n + CHUNK - 1) // CHUNK * CHUNK
    together = False
    count = n
    if low > least:
        count = count_from(keys, vectors, low)
        if count < k:
            low, count = least, n
        else:
            together = True
    if together:
        vectors = _bring_together(keys, vectors, low, room, space)
        searched = space
    largest = _largest(searched, vectors * LANES if together else n)
    high = largest + 1  # at least k are from low on, fewer from high on
    octaves = 4
    while high - low > 1 and count != k:
        middle = (low + high) // 2
        if least == 0 and low == 0 and octaves < 128:
            # Weights fall by the octave: the first guesses go down in steps that double.
            middle = largest - octaves * _OCTAVE
            octaves *= 2
            if middle <= low or middle >= high:
                middle = (low + high) // 2
        reached = count_from(searched, vectors, middle)
        if reached < k:
            high = middle
        else:
            low, count = middle, reached
            if not together and 4 * count < n:
                together = True
                vectors = _bring_together(keys, vectors, low, room, space)
                searched = space
    return low, count


@_njit
def _first_of(keys, least, rows, k):
    """Of the listed rows, whose keys reach `least`, put the k largest in front, in their order; of
    equal ones the first."""
    bits = carray(int32_pointer(keys), 1 << 31)
    above = np.int64(0)
    for i in range(len(rows)):
        above += bits[rows[i]] > least
    equal, at = k - above, 0
    for i in range(len(rows)):
        row = rows[i]
        if bits[row] > least or (bits[row] == least and equal > 0):
            equal -= bits[row] == least
            rows[at] = row
            at += 1
            if at == k:
                break
    return at


@_njit
def _largest(keys, n):
    bits = carray(int32_pointer(keys), n)
    largest = np.int32(_LEAST)
    for i in range(n):
        largest = max(largest, bits[i])
    return np.int64(largest)


@_njit
def _bring_together(keys, vectors, least, room, space):
    """The keys that are at least so large, filled up to a whole block with what is below all
    others; returns the number of their vectors."""
    count = values_from(keys, keys, vectors, least, space)
    filled = BLOCK * blocks_of(count)
    own = carray(int32_pointer(space), room + LANES)
    for i in range(count, filled):
        own[i] = _LEAST
    return filled // LANES
