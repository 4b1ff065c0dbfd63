"""The rows with the largest weights: candidates by the coarse code, then the best of them.

A thread does whole tasks (a query head, or those that choose together) while there are enough for
all threads: all that it wrote is in its cache then. Tasks that are left over are done by several
threads, step by step: some heads' candidates are found, then these are scored by all of their
code. Where there are few heads for that, too, the rows are scored in chunks before. Who ends the
last part of a step of a task goes on with what the task needs as a whole.
"""

import math

import numba
import numpy as np
from numba import carray

from saap.kernels.cpu.calls import call
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
    CANDIDATES,
    CHUNK,
    FIND,
    NEXT_UNIT,
    NEXT_WORKER,
    PREPARE,
    SCAN,
    STEP_FIELDS,
    STEPS,
    WEIGH,
    blocks_of,
    place_of,
    planes_bytes,
)
from .numba_queries import prepare
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
    """C function to compile; `stamp` becomes a part of the cache's key.

    One for all steps, which share most of their code: each alone would be compiled as long.
    """

    def choose_entry(jobs):
        _ = stamp
        _work(carray(jobs, 1))

    return choose_entry


def drive_entry(stamp):
    """C function to compile that does all steps of a job, one after the other."""

    def drive(jobs):
        _ = stamp
        _drive(carray(jobs, 1))

    return drive


@_njit
def _drive(jobs):
    job, address = jobs[0], jobs.ctypes.data
    finished = carray(int64_pointer(job.finished), STEPS * job.tasks)
    for i in range(STEPS * job.tasks):
        finished[i] = 0
    steps = carray(int64_pointer(job.steps), (job.n_steps, STEP_FIELDS))
    for i in range(job.n_steps):
        job.step, job.parts, job.units, workers, job.ahead = steps[i]
        job.next_worker = job.next_unit = 0
        if workers == 1:
            call(job.choose, (address,))
        else:
            call(job.parallel, (job.choose, address, workers, 0))
    if job.counts:
        job.used = 0
        counts = carray(int64_pointer(job.counts), job.tasks)
        for i in range(job.tasks):
            job.used = max(job.used, counts[i])


@_njit
def _work(jobs):
    """What a task keeps lies in a *slot*: its worker's if it is done alone, else its own."""
    job, counters = jobs[0], jobs.ctypes.data
    worker = fetch_increment(counters + NEXT_WORKER)
    space = job.workspace + job.worker_bytes * worker
    while True:
        unit = fetch_increment(counters + NEXT_UNIT)
        if unit >= job.units:
            break
        if job.step == FIND:
            if unit < job.alone:
                _choose_alone(job, unit, worker, space)
                continue
            unit -= job.alone
        task, part = job.alone + unit // job.parts, unit % job.parts
        slot = job.first_slot + task - job.alone
        if job.step == FIND:
            _find(job, task, part, worker, slot, space)
            if _is_last(job, task):
                _list_candidates(job, task, slot)
        elif job.step == PREPARE:
            prepare(job, task, 0, job.group)
        elif job.step == SCAN:
            weigh_chunk(job, task, part, slot, 0, job.group, space)
        elif job.step == CANDIDATES:
            _find_candidates(job, task, part, slot, slot, space)
            if _is_last(job, task):
                _list_candidates(job, task, slot)
        elif job.step == WEIGH:
            _weigh_candidates(job, task, slot, part, space)
            if _is_last(job, task):
                _choose(job, task, slot, space)
        else:
            _choose(job, task, slot, space)


@_njit
def _is_last(job, task):
    """Whether this was the last part of the task that was to be done in this step."""
    return fetch_increment(job.finished + 8 * (STEPS * task + job.step)) == job.parts - 1


@_njit
def _choose_alone(job, task, slot, space):
    n = place_of(job, task)[2]
    if not _takes_all(job, n):
        prepare(job, task, 0, job.group)
        if job.whole or job.candidates < n:
            for chunk in range(job.chunks):
                weigh_chunk(job, task, chunk, slot, 0, job.group, space)
    if not job.whole:
        for g in range(job.group):
            _find_candidates(job, task, g, slot, slot, space)
        _list_candidates(job, task, slot)
        for chunk in range(job.listed_chunks):
            _weigh_candidates(job, task, slot, chunk, space)
    _choose(job, task, slot, space)


@_njit
def _find(job, task, part, worker, slot, space):
    """Mark the candidates of some heads of a task."""
    n = place_of(job, task)[2]
    first = part * job.heads_at_once
    end = min(first + job.heads_at_once, job.group)
    if _takes_all(job, n):
        return
    prepare(job, task, first, end)
    if job.candidates >= n:
        return
    for chunk in range(job.chunks):
        weigh_chunk(job, task, chunk, worker, first, end, space)
    for g in range(first, end):
        _find_candidates(job, task, g, worker, slot, space)


@_njit
def _takes_all(job, n):
    """Whether every one of n rows is chosen, whatever it weighs."""
    return job.max_tokens >= n and job.least_weight == 0


@_njit
def _find_candidates(job, task, g, scored, slot, space):
    """Mark a head's `job.candidates` best rows by the coarse scores in the slot `scored`.

    Each has its own, since coarse scores err by a share of how far a head's scores are apart:
    among all heads' rows, a peaked head's would lose to those of flat ones.
    """
    n = place_of(job, task)[2]
    if job.candidates >= n or _takes_all(job, n):
        return
    keys = job.scores + 4 * (scored * job.group + g) * job.chunks * CHUNK
    marks = _marks_of(job, slot * job.group + g)
    for i in range(blocks_of(n) * BLOCK // 8):
        marks[i] = 0
    low = likely_below(keys, n, job.candidates, space)
    mark_best(keys, n, job.candidates, low, marks, space)


@_njit
def _list_candidates(job, task, slot):
    """The rows that any head has marked."""
    n = place_of(job, task)[2]
    found = carray(int64_pointer(job.found), slot + 1)
    place = _listed_at(job, slot)
    if _takes_all(job, n):
        found[slot] = 0
        return
    if job.candidates >= n:
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
def _weigh_candidates(job, task, slot, chunk, space):
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
def _choose(job, task, slot, space):
    """Write the ranges of a task, and of how many rows all of the code was read."""
    n = place_of(job, task)[2]
    scored = np.int64(0)
    if _takes_all(job, n):
        kept = n
        _list_all(n, space)
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
            maxima[g, chunk] /= np.float32(total)
    room = job.chunks * CHUNK
    weights = job.scores + 4 * slot * job.group * room
    for chunk in range(n_chunks):
        vectors = blocks_of(min(CHUNK, n - chunk * CHUNK)) * _PER_BLOCK
        own = weights + 4 * chunk * CHUNK
        add_weighed(own, 4 * room, job.group, job.maxima + place + 4 * chunk, 4 * job.chunks,
                    vectors, own)  # fmt: skip
    return _best_of(job, weights, n, space, 0)


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
    add_weighed(scores, 4 * room, job.group, place, 4 * job.listed_chunks, vectors, scores)
    return _best_of(job, scores, found, space, _listed_at(job, slot))


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
