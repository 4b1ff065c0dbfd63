"""Scores of all rows by their coarse codes: lanes are rows, so no sum runs across a register."""

import numba
import numpy as np
from numba import carray

from saap.kernels.cpu.jobs import job_type, offset_of
from saap.kernels.cpu.memory import (
    fetch_increment,
    float32_pointer,
    int32_pointer,
    int64_pointer,
    uint8_pointer,
)

from .layout import PER_WORD, SIGN, STEP_4
from .numba_words import add_bits, add_twos

_FIELDS = (
    "q coarse fine scale table rows scores maxima totals starts lengths counts "  # addresses
    "tasks heads kv_heads group coordinates most chunks by_sequence "
    "coarse_batch coarse_head coarse_plane fine_batch fine_head scale_batch scale_head "  # bytes
    "out_batch out_head capacity first_row max_tokens candidates "
    "workspace next_worker next_task"
).split()
NEXT_WORKER = offset_of(_FIELDS, "next_worker")
NEXT_TASK = offset_of(_FIELDS, "next_task")

Job, SIGNATURE = job_type(_FIELDS, ("unused",))

CHUNK = 1024
"""Rows of a unit of work; their codes and sums stay in the first-level cache."""

_UPPER, _UPPER_ZERO = np.float32(4 * STEP_4), np.float32(-6 * STEP_4)
_SIGN, _SIGN_ZERO = np.float32(2 * SIGN), np.float32(-SIGN)
_LOG2_E = np.float32(1.4426950408889634)

_njit = numba.njit(error_model="numpy")


@_njit
def workspace_floats(group):
    return CHUNK * (group + 1)


@_njit
def place_of(job, task):
    """Sequence, KV head and number of rows of a task."""
    b = task // job.heads if job.by_sequence else np.int64(0)
    kv_head = task % job.heads * job.kv_heads // job.heads
    return b, kv_head, carray(int64_pointer(job.rows), b + 1)[b]


def entry(stamp):
    """C function to compile; `stamp` becomes a part of the cache's key."""

    def scan_entry(jobs):
        _ = stamp
        _work(carray(jobs, 1))

    return scan_entry


@_njit
def _work(jobs):
    job = jobs[0]
    counters = jobs.ctypes.data
    worker = fetch_increment(counters + NEXT_WORKER)
    space = job.workspace + 4 * workspace_floats(job.group) * worker
    while True:
        unit = fetch_increment(counters + NEXT_TASK)
        if unit >= job.tasks * job.chunks:
            break
        _scan(job, unit // job.chunks, unit % job.chunks, space)


@_njit
def _scan(job, task, chunk, space):
    b, kv_head, n = place_of(job, task)
    first = chunk * CHUNK
    length = min(CHUNK, n - first)
    maxima = carray(float32_pointer(job.maxima + 4 * task * job.group * job.chunks),
                    (job.group, job.chunks))  # fmt: skip
    totals = carray(float32_pointer(job.totals + 4 * task * job.group * job.chunks),
                    (job.group, job.chunks))  # fmt: skip
    if length <= 0:
        for g in range(job.group):
            maxima[g, chunk] = -np.inf
            totals[g, chunk] = np.float32(0.0)
        return
    q = carray(float32_pointer(job.q + 4 * task * job.group * job.coordinates),
               (job.group, job.coordinates))  # fmt: skip
    sums = carray(float32_pointer(space), (job.group, CHUNK))
    code = carray(float32_pointer(space + 4 * CHUNK * job.group), CHUNK)
    quarter = job.coordinates // 4
    for g in range(job.group):
        zero = np.float32(0.0)
        for d in range(quarter):
            zero += q[g, d] * _UPPER_ZERO
        for d in range(quarter, 3 * quarter):
            zero += q[g, d] * _SIGN_ZERO
        for r in range(length):
            sums[g, r] = zero
    place = job.coarse + b * job.coarse_batch + kv_head * job.coarse_head + 4 * first
    n_words = quarter // PER_WORD
    for w in range(n_words):
        at = w * PER_WORD
        words = carray(int32_pointer(place + w * job.coarse_plane), length)
        add_twos(words, q, at, _UPPER, length, job.group, sums)
        words = carray(int32_pointer(place + (n_words + w) * job.coarse_plane), length)
        add_bits(words, q, quarter + at, 2 * quarter + at, _SIGN, _SIGN, length, job.group, sums)
    scale = carray(uint8_pointer(job.scale + b * job.scale_batch + kv_head * job.scale_head
                                 + first), length)  # fmt: skip
    table = carray(float32_pointer(job.table), 256)
    for r in range(length):
        code[r] = table[scale[r]]
    scores = carray(float32_pointer(job.scores + 4 * task * job.group * job.most),
                    (job.group, job.most))  # fmt: skip
    for g in range(job.group):
        best = np.float32(-np.inf)
        for r in range(length):
            score = sums[g, r] * code[r]
            scores[g, first + r] = score
            best = max(best, score)
        maxima[g, chunk] = best
        totals[g, chunk] = _total_of_powers(scores[g, first : first + length], best, sums[g])


@_njit
def _total_of_powers(scores, best, room):
    for i in range(len(scores)):
        room[i] = power(scores[i] - best)
    return _total(room, len(scores))


@numba.njit(error_model="numpy", fastmath={"reassoc"})
def _total(values, length):
    """A sum in whatever order: lanes are added up apart."""
    total = np.float32(0.0)
    for i in range(length):
        total += values[i]
    return total


@_njit
def power(x):
    """e**x for x <= 0, to 3e-7 relative; 0 below e**-87. No calls, so loops become vectors."""
    x = max(x * _LOG2_E, np.float32(-126.0))
    whole = np.floor(x)
    f = x - whole
    # Minimax polynomial of 2**f on [0, 1).
    y = np.float32(1.8775767e-3)
    y = y * f + np.float32(8.9893397e-3)
    y = y * f + np.float32(5.5826318e-2)
    y = y * f + np.float32(2.4015361e-1)
    y = y * f + np.float32(6.9315308e-1)
    y = y * f + np.float32(9.9999994e-1)
    return y * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)
