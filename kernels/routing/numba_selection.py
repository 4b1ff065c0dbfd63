"""The best lists within a budget, as ranges of rows, without sorting: a threshold is looked for
by the bits of the scores, 11 of them at a time, and lists are then taken in the order of their
rows."""

import numba
import numpy as np
from numba import carray

from saap.kernels.cpu.jobs import job_type, offset_of
from saap.kernels.cpu.memory import (
    fetch_increment,
    float32_pointer,
    float64_pointer,
    int32_pointer,
    int64_pointer,
)

from .numba_simd import ordered_bits

_FIELDS = (
    "scores offsets starts lengths counts "  # addresses; counts int64 [tasks]
    "tasks heads kv_heads lists capacity "
    "offsets_batch row_bytes "  # bytes to the next sequence's offsets, to the next row of ranges
    "first_row nprobe max_tokens "  # -1: no bound
    "per_row "  # a list's mass is its score times its size
    "workspace next_worker next_task"
).split()
_SCALARS = ("top_p", "min_score")  # above 1, -inf: no bound
_NEXT_WORKER = offset_of(_FIELDS, "next_worker")
_NEXT_TASK = offset_of(_FIELDS, "next_task")

Job, SIGNATURE = job_type(_FIELDS, _SCALARS)

BINS = 2048
HISTOGRAM_BYTES = 8 * 3 * BINS
_SHIFTS = (21, 10, 0)
LARGEST_ROW = 2**31 - 1
BAD_OFFSETS, NO_ROOM = -1, -2  # in place of a count of ranges

_njit = numba.njit(error_model="numpy")


@_njit
def workspace_bytes(n_lists):
    """Bytes of memory that a worker needs."""
    return HISTOGRAM_BYTES + 4 * (n_lists + n_lists % 2)


def entry(stamp):
    """C function to compile; `stamp` becomes a part of the cache's key."""

    def select_entry(jobs):
        _ = stamp
        _work(carray(jobs, 1))

    return select_entry


@_njit
def _work(jobs):
    job = jobs[0]
    counters = jobs.ctypes.data
    worker = fetch_increment(counters + _NEXT_WORKER)
    space = job.workspace + workspace_bytes(job.lists) * worker
    counts = carray(int64_pointer(job.counts), job.tasks)
    while True:
        task = fetch_increment(counters + _NEXT_TASK)
        if task >= job.tasks:
            break
        counts[task] = _select(job, task, space)


@_njit
def _select(job, task, space):
    """Writes the ranges of one row; returns how many, or `BAD_OFFSETS` or `NO_ROOM`."""
    b, kv_head = task // job.heads, task % job.heads * job.kv_heads // job.heads
    scores = carray(float32_pointer(job.scores + 4 * task * job.lists), job.lists)
    place = b * job.offsets_batch + 4 * kv_head * (job.lists + 1)
    offsets = carray(int32_pointer(job.offsets + place), job.lists + 1)
    if offsets[0] < 0 or job.first_row + offsets[job.lists] > LARGEST_ROW:
        return BAD_OFFSETS
    most_rows = job.max_tokens if job.max_tokens >= 0 else np.int64(2**62)
    most_lists = job.nprobe if job.nprobe >= 0 else np.int64(2**62)
    most_mass = np.inf
    if job.top_p < 1.0:
        total = 0.0
        for i in range(job.lists):
            size = offsets[i + 1] - offsets[i]
            if _counts(job, scores[i], size):
                total += _mass(job, scores[i], size)
        most_mass = job.top_p * total
    threshold, rows, lists, mass = np.int64(0), np.int64(0), np.int64(0), 0.0
    if job.max_tokens >= 0 or job.nprobe >= 0 or job.top_p < 1.0:
        threshold, rows, lists, mass = _threshold(
            job, scores, offsets, most_rows, most_lists, most_mass, space
        )
    starts = carray(int32_pointer(job.starts + task * job.row_bytes), job.capacity)
    lengths = carray(int32_pointer(job.lengths + task * job.row_bytes), job.capacity)
    found, end, smallest = 0, np.int64(-1), np.int64(0)
    for i in range(job.lists):
        size = np.int64(offsets[i + 1]) - offsets[i]
        smallest = min(smallest, size)
        bits = ordered_bits(scores[i])
        if bits < threshold or not _counts(job, scores[i], size):
            continue
        if bits == threshold:
            full = job.top_p < 1.0 and lists > 0 and mass >= most_mass
            if rows >= most_rows or lists >= most_lists or full:
                continue
            mass += _mass(job, scores[i], size)
            size = min(size, most_rows - rows)
            rows += size
            lists += 1
        start = job.first_row + offsets[i + 1] - size
        if start == end:
            lengths[found - 1] += size
        elif found == job.capacity:
            return NO_ROOM
        else:
            starts[found], lengths[found] = start, size
            found += 1
        end = start + size
    for i in range(found, job.capacity):
        starts[i] = lengths[i] = 0
    return found if smallest >= 0 else BAD_OFFSETS


@_njit
def _counts(job, score, size):
    """Whether a list can be chosen: it holds rows, and is not below the bound, as NaN is."""
    return size > 0 and (score >= job.min_score or job.min_score == -np.inf)


@_njit
def _mass(job, score, size):
    if not score > 0:  # or NaN
        return 0.0
    return np.float64(score) * (size if job.per_row else 1)


@_njit
def _threshold(job, scores, offsets, most_rows, most_lists, most_mass, space):
    """Bits of the score at which a bound is reached, and what all lists above it add up to."""
    rows, lists, mass = np.int64(0), np.int64(0), 0.0
    rows_of = carray(int64_pointer(space), BINS)
    lists_of = carray(int64_pointer(space + 8 * BINS), BINS)
    mass_of = carray(float64_pointer(space + 16 * BINS), BINS)
    left = carray(int32_pointer(space + HISTOGRAM_BYTES), len(scores))
    n_left, known, known_shift = 0, np.int64(0), 32
    for shift in _SHIFTS:
        for i in range(BINS):
            rows_of[i] = lists_of[i] = 0
            mass_of[i] = 0.0
        if shift == _SHIFTS[0]:  # a loop of its own: one that lists candidates takes 30 % longer
            for i in range(len(scores)):
                size = offsets[i + 1] - offsets[i]
                if _counts(job, scores[i], size):
                    at = ordered_bits(scores[i]) >> shift
                    rows_of[at] += size
                    lists_of[at] += 1
                    if job.top_p < 1.0:
                        mass_of[at] += _mass(job, scores[i], size)
        else:
            # Only the lists of the bin at which a bound was reached can be the last.
            n_before, n_left = (len(scores) if known_shift == _SHIFTS[0] else n_left), 0
            for place in range(n_before):
                i = place if known_shift == _SHIFTS[0] else left[place]
                bits = ordered_bits(scores[i])
                if bits >> known_shift == known:
                    size = offsets[i + 1] - offsets[i]
                    if _counts(job, scores[i], size):
                        left[n_left] = i
                        n_left += 1
                        at = (bits >> shift) & (BINS - 1 if shift else BINS // 2 - 1)
                        rows_of[at] += size
                        lists_of[at] += 1
                        mass_of[at] += _mass(job, scores[i], size)
        at, lowest = np.int64(BINS - 1), np.int64(-1)
        while at >= 0:
            if lists_of[at] > 0:
                lowest = at
                if (
                    rows + rows_of[at] >= most_rows
                    or lists + lists_of[at] >= most_lists
                    or (job.top_p < 1.0 and mass + mass_of[at] >= most_mass)
                ):
                    break
            rows += rows_of[at]
            lists += lists_of[at]
            mass += mass_of[at]
            at -= 1
        if at < 0:
            if known_shift == 32:  # all lists together reach no bound
                return np.int64(0), rows, lists, mass
            # Sums of masses in another order may round to just below the bound they had reached.
            at = lowest
            rows -= rows_of[at]
            lists -= lists_of[at]
            mass -= mass_of[at]
        known = (known << (known_shift - shift)) | at
        known_shift = shift
    return known, rows, lists, mass
