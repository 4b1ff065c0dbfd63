"""Who does what of a choice of rows, whose parts are in `numba_task`.

A thread does whole tasks (a query head, or those that choose together) while there are enough for
all threads: all that it wrote is in its cache then. Tasks that are left over are done by several
threads, step by step: some heads' candidates are found, then these are scored by all of their
code. Where there are few heads for that, too, the rows are scored in chunks before. Who ends the
last part of a step of a task goes on with what the task needs as a whole.
"""

import numba
from numba import carray

from saap.kernels.cpu.calls import call
from saap.kernels.cpu.memory import fetch_increment, int64_pointer

from .numba_job import (
    CANDIDATES,
    FIND,
    NEXT_UNIT,
    NEXT_WORKER,
    PREPARE,
    SCAN,
    STEP_FIELDS,
    STEPS,
    WEIGH,
    candidates_of,
    place_of,
)
from .numba_queries import prepare
from .numba_scan import weigh_chunk
from .numba_task import choose, find_candidates, list_candidates, takes_all, weigh_candidates

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
                list_candidates(job, task, slot)
        elif job.step == PREPARE:
            prepare(job, task, 0, job.group)
        elif job.step == SCAN:
            weigh_chunk(job, task, part, slot, 0, job.group, space)
        elif job.step == CANDIDATES:
            find_candidates(job, task, part, slot, slot, space)
            if _is_last(job, task):
                list_candidates(job, task, slot)
        elif job.step == WEIGH:
            weigh_candidates(job, task, slot, part, space)
            if _is_last(job, task):
                choose(job, task, slot, space)
        else:
            choose(job, task, slot, space)


@_njit
def _is_last(job, task):
    """Whether this was the last part of the task that was to be done in this step."""
    return fetch_increment(job.finished + 8 * (STEPS * task + job.step)) == job.parts - 1


@_njit
def _choose_alone(job, task, slot, space):
    n = place_of(job, task)[2]
    if not takes_all(job, n):
        prepare(job, task, 0, job.group)
        if job.whole or candidates_of(job, n) < n:
            for chunk in range(job.chunks):
                weigh_chunk(job, task, chunk, slot, 0, job.group, space)
    if not job.whole:
        for g in range(job.group):
            find_candidates(job, task, g, slot, slot, space)
        list_candidates(job, task, slot)
        for chunk in range(job.listed_chunks):
            weigh_candidates(job, task, slot, chunk, space)
    choose(job, task, slot, space)


@_njit
def _find(job, task, part, worker, slot, space):
    """Mark the candidates of some heads of a task."""
    n = place_of(job, task)[2]
    first = part * job.heads_at_once
    end = min(first + job.heads_at_once, job.group)
    if takes_all(job, n):
        return
    prepare(job, task, first, end)
    if candidates_of(job, n) >= n:
        return
    for chunk in range(job.chunks):
        weigh_chunk(job, task, chunk, worker, first, end, space)
    for g in range(first, end):
        find_candidates(job, task, g, worker, slot, space)
