"""The choice in phases, whose units are smaller than a task: for fewer tasks than keep all threads
busy. Every row is scored (`numba_scan`); each head's candidates are found; these are scored by all
of their code. Whoever ends the last unit of a task in a phase goes on with the task as a whole."""

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

from .numba_best import likely_below, mark_best
from .numba_choice import (
    best_of,
    list_all,
    score_listed,
    sum_of_softmax,
    takes_all,
    write_ranges,
)
from .numba_job import CHUNK, NEXT_TASK, NEXT_WORKER, PHASES, blocks_of, place_of
from .numba_simd import BLOCK
from .numba_vectors import places_of_marks

_PER_BLOCK = BLOCK // LANES

_njit = numba.njit(error_model="numpy")


def candidates_entry(stamp):
    """C function to compile; `stamp` becomes a part of the cache's key."""

    def candidates(jobs):
        _ = stamp
        _find_candidates(carray(jobs, 1))

    return candidates


def weigh_entry(stamp):
    def weigh(jobs):
        _ = stamp
        _weigh_candidates(carray(jobs, 1))

    return weigh


@_njit
def _find_candidates(jobs):
    """A unit is a head."""
    job = jobs[0]
    space = _space_of_worker(jobs)
    while True:
        unit = fetch_increment(jobs.ctypes.data + NEXT_TASK)
        if unit >= job.tasks * job.group:
            break
        task = unit // job.group
        n = place_of(job, task)[2]
        if job.candidates < n and not takes_all(job, n):
            _mark_candidates(job, unit, n, space)
        if _is_last(job, task, 0, job.group):
            _list_candidates(job, task, n)


@_njit
def _mark_candidates(job, head, n, space):
    keys = job.scores + 4 * head * job.chunks * CHUNK
    marks = _marks_of(job, head)
    for i in range(len(marks)):
        marks[i] = 0
    low = likely_below(keys, n, job.candidates, space)
    mark_best(keys, n, job.candidates, low, marks, space)


@_njit
def _list_candidates(job, task, n):
    """The rows that any head of the task has marked."""
    found = carray(int64_pointer(job.found), job.tasks)
    place = _listed_at(job, task)
    if takes_all(job, n):
        found[task] = 0
        return
    if job.candidates >= n:
        list_all(n, place)
        found[task] = n
        return
    first = _marks_of(job, task * job.group)
    for g in range(1, job.group):
        own = _marks_of(job, task * job.group + g)
        for i in range(len(first)):
            first[i] |= own[i]
    found[task] = places_of_marks(first.ctypes.data, blocks_of(n) * _PER_BLOCK, place)


@_njit
def _weigh_candidates(jobs):
    """A unit is a chunk of a task's candidates."""
    job = jobs[0]
    space = _space_of_worker(jobs)
    found = carray(int64_pointer(job.found), job.tasks)
    room = job.listed_chunks * CHUNK
    while True:
        unit = fetch_increment(jobs.ctypes.data + NEXT_TASK)
        if unit >= job.tasks * job.listed_chunks:
            break
        task, chunk = unit // job.listed_chunks, unit % job.listed_chunks
        first = chunk * CHUNK
        last = min(first + CHUNK, found[task])
        if last > first:
            b, kv_head, _ = place_of(job, task)
            listed = carray(int32_pointer(_listed_at(job, task)), last)
            scores = job.listed_scores + 4 * (task * job.group * room + first)
            maxima = job.listed_maxima + 4 * (task * job.group * job.listed_chunks + chunk)
            score_listed(job, task, b, kv_head, listed[first:], space, scores, room,
                         maxima, 4 * job.listed_chunks)  # fmt: skip
        if _is_last(job, task, 1, job.listed_chunks):
            _choose(job, task, found[task], space)


@_njit
def _choose(job, task, found, space):
    """Write the ranges of a task."""
    n = place_of(job, task)[2]
    if takes_all(job, n):
        list_all(n, space)
        kept = n
    else:
        kept = _best_of_candidates(job, task, found, space)
    carray(int64_pointer(job.counts), job.tasks)[task] = write_ranges(job, task, space, kept)
    carray(int64_pointer(job.scored), job.tasks)[task] = found


@_njit
def _best_of_candidates(job, task, found, space):
    """Lists them in `space`; returns how many."""
    scores = job.listed_scores + 4 * task * job.group * job.listed_chunks * CHUNK
    largest = carray(float32_pointer(space), job.group)
    maxima = carray(float32_pointer(job.listed_maxima), (job.tasks, job.group, job.listed_chunks))
    for g in range(job.group):
        largest[g] = -np.inf
        for chunk in range((found + CHUNK - 1) // CHUNK):
            largest[g] = max(largest[g], maxima[task, g, chunk])
    sum_of_softmax(job, task, found, scores, job.listed_chunks * CHUNK, space, scores)
    return best_of(job, scores, found, space, _listed_at(job, task))


@_njit
def _is_last(job, task, phase, units):
    return fetch_increment(job.finished + 8 * (PHASES * task + phase)) == units - 1


@_njit
def _space_of_worker(jobs):
    worker = fetch_increment(jobs.ctypes.data + NEXT_WORKER)
    return jobs[0].workspace + jobs[0].worker_bytes * worker


@_njit
def _marks_of(job, head):
    size = job.chunks * CHUNK // 8
    return carray(uint8_pointer(job.marks + head * size), size)


@_njit
def _listed_at(job, task):
    return job.listed + 4 * task * (job.listed_chunks * CHUNK + LANES)
