"""What is done for one task of a choice: candidates by the coarse code, then the best of them.

A task's rows are scored by `numba_scan`; what is found out lies in a *slot* of the job's buffers.
"""

import math

import numba
import numpy as np
from numba import carray

from saap.kernels.cpu.emitter import LANES
from saap.kernels.cpu.memory import float32_pointer, int32_pointer, int64_pointer, uint8_pointer

from .numba_beside import lse_beside
from .numba_best import best, likely_below, mark_best
from .numba_job import CHUNK, blocks_of, candidates_of, place_of, planes_bytes
from .numba_scan import bring, score
from .numba_simd import BLOCK, WIDEST
from .numba_vectors import (
    add_weighed,
    count_from,
    exponentials,
    places_from,
    places_of_marks,
    sum_below,
    values_from,
)

_PER_BLOCK = BLOCK // LANES

_njit = numba.njit(error_model="numpy")


@_njit
def takes_all(job, n):
    """Whether every one of n rows is chosen, whatever it weighs."""
    return job.max_tokens >= n and job.least_weight == 0


@_njit
def find_candidates(job, task, g, scored, slot, space):
    """Mark the best rows of a head, its candidates, by the coarse scores in the slot `scored`.

    Each has its own, since coarse scores err by a share of how far a head's scores are apart:
    among all heads' rows, a peaked head's would lose to those of flat ones.
    """
    n = place_of(job, task)[2]
    wanted = candidates_of(job, n)
    if wanted >= n or takes_all(job, n):
        return
    keys = job.scores + 4 * (scored * job.group + g) * job.chunks * CHUNK
    marks = _marks_of(job, slot * job.group + g)
    for i in range(blocks_of(n) * BLOCK // 8):
        marks[i] = 0
    low = likely_below(keys, n, wanted, space)
    mark_best(keys, n, wanted, low, marks, space)


@_njit
def list_candidates(job, task, slot):
    """The rows that any head has marked."""
    n = place_of(job, task)[2]
    found = carray(int64_pointer(job.found), slot + 1)
    place = _listed_at(job, slot)
    if takes_all(job, n):
        found[slot] = 0
        return
    if candidates_of(job, n) >= n:
        _list_all(n, place)
        found[slot] = n
        return
    first = _marks_of(job, slot * job.group)
    for g in range(1, job.group):
        own = _marks_of(job, slot * job.group + g)
        for i in range(blocks_of(n) * BLOCK // 8):
            first[i] |= own[i]
    found[slot] = places_of_marks(first.ctypes.data, blocks_of(n) * _PER_BLOCK, place)


@_njit
def weigh_candidates(job, task, slot, chunk, space):
    """Each head's scores of a chunk of the candidates, by all of their code."""
    first = chunk * CHUNK
    length = min(CHUNK, carray(int64_pointer(job.found), slot + 1)[slot] - first)
    if length <= 0:
        return
    b, kv_head, _ = place_of(job, task)
    listed = carray(int32_pointer(_listed_at(job, slot) + 4 * first), length)
    chunk_rows = carray(int32_pointer(space + planes_bytes(job.coordinates)), CHUNK)
    for i in range(length):
        chunk_rows[i] = listed[i]
    bring(job, b, kv_head, length, 1, space)
    room = job.listed_chunks * CHUNK
    scores = job.listed_scores + 4 * (slot * job.group * room + first)
    maxima = job.listed_maxima + 4 * (slot * job.group * job.listed_chunks + chunk)
    for g in range(0, job.group, WIDEST):
        score(job, task, g, min(g + WIDEST, job.group), length, 1, space,
              scores + 4 * g * room, 4 * room, maxima + 4 * g * job.listed_chunks,
              4 * job.listed_chunks)  # fmt: skip


@_njit
def choose(job, task, slot, space):
    """Write the ranges of a task, and of how many rows all of the code was read."""
    n = place_of(job, task)[2]
    scored = np.int64(0)
    if takes_all(job, n):
        kept = n
        _list_all(n, space)
        if job.left_out:
            _left_out_of(job, task)[:] = -np.inf
    elif job.whole:
        kept, scored = _best_of_all(job, task, slot, n, space), n
    else:
        scored = carray(int64_pointer(job.found), slot + 1)[slot]
        kept = _best_of_candidates(job, task, slot, scored, space)
    carray(int64_pointer(job.counts), job.tasks)[task] = _write_ranges(job, task, space, kept)
    carray(int64_pointer(job.scored), job.tasks)[task] = scored


@_njit
def _best_of_all(job, task, slot, n, space):
    """Of all rows, whose weights in each chunk are known, those that weigh most in the sum of the
    heads' softmax; lists them in `space` and returns how many."""
    n_chunks = (n + CHUNK - 1) // CHUNK
    place = 4 * slot * job.group * job.chunks
    shape = (job.group, job.chunks)
    maxima = carray(float32_pointer(job.maxima + place), shape)
    totals = carray(float32_pointer(job.totals + place), shape)
    for g in range(job.group):
        largest = maxima[g, 0]
        for chunk in range(1, n_chunks):
            largest = max(largest, maxima[g, chunk])
        total = 0.0
        for chunk in range(n_chunks):
            share = math.exp(maxima[g, chunk] - largest)
            maxima[g, chunk] = share
            total += share * totals[g, chunk]
        total += _outside(job, task, g, largest)
        for chunk in range(n_chunks):
            totals[g, chunk] = maxima[g, chunk]
            maxima[g, chunk] /= np.float32(total)
        if job.left_out:
            _left_out_of(job, task)[g] = largest
    room = job.chunks * CHUNK
    weights, sums = job.scores + 4 * slot * job.group * room, job.sums + 4 * slot * room
    for chunk in range(n_chunks):
        vectors = blocks_of(min(CHUNK, n - chunk * CHUNK)) * _PER_BLOCK
        first = 4 * chunk * CHUNK
        add_weighed(weights + first, 4 * room, job.group, job.maxima + place + 4 * chunk,
                    4 * job.chunks, vectors, sums + first)  # fmt: skip
    kept, least, equal = _best_of(job, sums, n, space, 0)
    if job.left_out:
        _leave_out(job, task, weights, room, totals, n_chunks, sums, n, least, equal)
    return kept


@_njit
def _best_of_candidates(job, task, slot, found, space):
    """Of the candidates those that weigh most in the sum of the heads' softmax; lists them in
    `space` and returns how many."""
    room = job.listed_chunks * CHUNK
    scores = job.listed_scores + 4 * slot * job.group * room
    place = job.listed_maxima + 4 * slot * job.group * job.listed_chunks
    maxima = carray(float32_pointer(place), (job.group, job.listed_chunks))
    vectors = blocks_of(found) * _PER_BLOCK
    for g in range(job.group):
        largest = np.float32(-np.inf)
        for chunk in range((found + CHUNK - 1) // CHUNK):
            largest = max(largest, maxima[g, chunk])
        total = exponentials(scores + 4 * g * room, vectors, largest)
        total += _outside(job, task, g, largest)
        maxima[g, 0] = np.float32(1.0) / total
        if job.left_out:
            _left_out_of(job, task)[g] = largest
    sums = job.sums + 4 * slot * room
    add_weighed(scores, 4 * room, job.group, place, 4 * job.listed_chunks, vectors, sums)
    kept, least, equal = _best_of(job, sums, found, space, _listed_at(job, slot))
    if job.left_out:
        maxima[:, 0] = np.float32(1.0)
        _leave_out(job, task, scores, room, maxima, 1, sums, found, least, equal)
    return kept


@_njit
def _best_of(job, weights, n, out, names):
    """The rows that weigh most, as many as are asked for and weigh enough; returns how many, and
    what `best` returns.

    names: what to call them, int32; 0: by their numbers.
    """
    kept = min(job.max_tokens, n)
    vectors = blocks_of(n) * _PER_BLOCK
    if job.least_weight == 0 or count_from(weights, vectors, job.least_weight) > kept:
        least, equal = best(weights, n, kept, out, names)
        return kept, least, equal
    if names:
        kept = values_from(weights, names, vectors, job.least_weight, out)
    else:
        kept = places_from(weights, vectors, job.least_weight, out)
    return kept, job.least_weight, n


@_njit
def _leave_out(job, task, weights, room, factors, n_chunks, sums, n, least, equal):
    """Tell of each head the log-sum-exp of its scores with the rows that were not chosen.

    Its largest score is there already. weights: of rows beside one of that score, in so many
    chunks, or all in one, but for `factors`. Chosen are those of n rows whose `sums` are above
    `least`, and the first so many that are `equal`. What is visited in any case has no part in it:
    the same to the bit, however its scores were worked out.
    """
    left_out, bits = _left_out_of(job, task), carray(int32_pointer(sums), n)
    size = n if n_chunks == 1 else CHUNK
    for g in range(job.group):
        share = np.float32(0.0)
        for chunk in range(n_chunks):
            first = chunk * size
            vectors = blocks_of(min(size, n - first)) * _PER_BLOCK
            own = weights + 4 * (g * room + first)
            share += factors[g, chunk] * sum_below(own, sums + 4 * first, vectors, least)
        if equal < n:
            own, before = carray(float32_pointer(weights + 4 * g * room), n), np.int64(0)
            for i in range(n):
                if bits[i] == least:
                    if before >= equal:
                        share += factors[g, i // size] * own[i]
                    before += 1
        left_out[g] += np.float32(math.log(share)) if share > 0 else np.float32(-np.inf)


@_njit
def _left_out_of(job, task):
    return carray(float32_pointer(job.left_out + 4 * task * job.group), job.group)


@_njit
def _outside(job, task, g, largest):
    """What is visited in any case, beside a row of the largest score, whose weight is 1."""
    if job.outside:
        own = carray(float32_pointer(job.outside + 4 * (task * job.group + g)), 1)[0]
    elif job.beside:
        own = lse_beside(job, task, g)
    else:
        return np.float32(0.0)
    weight = np.float32(math.exp(own - largest))
    return weight if weight >= 0 else np.float32(0.0)  # NaN


@_njit
def _write_ranges(job, task, places, kept):
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
def _list_all(n, places):
    rows = carray(int32_pointer(places), n)
    for i in range(n):
        rows[i] = i


@_njit
def _marks_of(job, head):
    size = job.chunks * CHUNK // 8
    return carray(uint8_pointer(job.marks + head * size), size)


@_njit
def _listed_at(job, slot):
    return job.listed + 4 * slot * (job.listed_chunks * CHUNK + LANES)
