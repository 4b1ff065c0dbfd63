"""The stream-K kernel of the CPU backend: plan and work, as plain C functions.

Rows of the store that one list of ranges selects are its *tokens*, counted in the order of the
ranges; `TILE` of them are a tile. The tiles of all lists are laid end to end and cut into shares.
"""

import math

import numba
import numpy as np
from numba import carray

from saap.kernels.cpu.emitter import LANES
from saap.kernels.cpu.jobs import job_type, offset_of
from saap.kernels.cpu.memory import (
    fetch_increment,
    float32_pointer,
    int32_pointer,
    int64_pointer,
)

from .numba_simd import TILE
from .numba_tiles import attend, rescale, space_floats

SHARES = 4
"""Shares of a thread, so that one which is held up leaves its last ones to the others."""

MIN_TILES_PER_WORKER = 8

_FIELDS = (
    "q k v starts lengths out lse "  # addresses; q, out, lse float32, without gaps
    "k_batch k_head k_row v_batch v_head v_row "  # strides in bytes
    "lists list_heads kv_heads group ranges dim rows "  # B * list_heads, heads of a list
    "threads workers shares next_worker next_share done_shares "  # from workers on set by plan
    "wrong not_finite "  # whether a range is not within the rows, an lse not a number
    "tiles tokens slots "  # addresses of int64 [lists + 1], [lists], [2 * threads * SHARES]
    "worker_bytes scratch partials"  # as `float_counts` says, and addresses
).split()
_SCALARS = ("sm_scale", "softcap")  # softcap 0: none
_NEXT_WORKER = offset_of(_FIELDS, "next_worker")
_NEXT_SHARE = offset_of(_FIELDS, "next_share")
_DONE_SHARES = offset_of(_FIELDS, "done_shares")

Job, SIGNATURE = job_type(_FIELDS, _SCALARS)

_njit = numba.njit(error_model="numpy")


def float_counts(threads: int, group: int, dim: int) -> tuple[int, int]:
    """Sizes of a worker's part of a job's `scratch` and of `partials`, in float32."""
    state = group * (dim + LANES)
    worker = 4 * TILE + state + space_floats(group, dim)
    return worker, 2 * threads * SHARES * state


def entries(kind, stamp):
    """C functions `plan` and `work` to compile; `stamp` becomes a part of the cache's key."""

    def plan_entry(jobs):
        _ = stamp
        plan(carray(jobs, 1))

    def work_entry(jobs):
        _ = stamp
        work(carray(jobs, 1), kind)

    return plan_entry, work_entry


@_njit
def plan(jobs):
    """Counts tokens and tiles, decides on shares and workers, writes the empty lists' output.

    Nothing but `wrong` is set where a range is not within the rows.
    """
    job = jobs[0]
    job.not_finite = 0
    job.wrong = _leave_rows(job)
    if job.wrong:
        return
    lengths = carray(int32_pointer(job.lengths), job.lists * job.ranges)
    tiles = carray(int64_pointer(job.tiles), job.lists + 1)
    tokens = carray(int64_pointer(job.tokens), job.lists)
    tiles[0] = 0
    for row in range(job.lists):
        count = np.int64(0)
        for i in range(row * job.ranges, (row + 1) * job.ranges):
            count += lengths[i]
        tokens[row] = count
        tiles[row + 1] = tiles[row] + (count + TILE - 1) // TILE
        if count == 0:
            out, lse = _output(job, row)
            for i in range(job.group * job.dim):
                out[i] = 0
            for i in range(job.group):
                lse[i] = -np.inf
    total = tiles[job.lists]
    job.workers = max(1, min(job.threads, total // MIN_TILES_PER_WORKER))
    job.shares = 1 if job.workers == 1 else min(total, job.workers * SHARES)
    job.next_worker = job.next_share = job.done_shares = 0


@_njit
def _leave_rows(job):
    """Whether any range that is used does not lie within the rows."""
    n = job.lists * job.ranges
    starts = carray(int32_pointer(job.starts), n)
    lengths = carray(int32_pointer(job.lengths), n)
    wrong = False
    for i in range(n):
        start, length = np.int64(starts[i]), np.int64(lengths[i])
        wrong |= (length < 0) | ((length > 0) & ((start < 0) | (start + length > job.rows)))
    return wrong


@_njit
def work(jobs, kind):
    """Takes shares until none is left; `kind` is a value of the type that stores K and V."""
    job = jobs[0]
    tiles = carray(int64_pointer(job.tiles), job.lists + 1)
    tokens = carray(int64_pointer(job.tokens), job.lists)
    slots = carray(int64_pointer(job.slots), 2 * job.shares)
    total = tiles[job.lists]
    counters = jobs.ctypes.data
    state_size = job.group * (job.dim + LANES)
    worker = fetch_increment(counters + _NEXT_WORKER)
    rows = job.scratch + job.worker_bytes * worker
    state = carray(float32_pointer(rows + 16 * TILE), state_size)
    space = state.ctypes.data + 4 * state_size
    while True:
        share = fetch_increment(counters + _NEXT_SHARE)
        if share >= job.shares:
            break
        first, last = share * total // job.shares, (share + 1) * total // job.shares
        slots[2 * share] = slots[2 * share + 1] = -1
        row = _row_of(tiles, first)
        tile = first
        while tile < last:
            stop = min(last, tiles[row + 1])
            if stop > tile:
                begin = (tile - tiles[row]) * TILE
                end = min((stop - tiles[row]) * TILE, tokens[row])
                attend(job, kind, row, begin, end, rows, space, state)
                if begin == 0 and end == tokens[row]:
                    _finish(job, row, state)
                else:
                    slot = 2 * share if tile == first else 2 * share + 1
                    slots[slot] = row
                    _copy(state, _partial(job, slot))
            tile = stop
            row += 1
        if fetch_increment(counters + _DONE_SHARES) == job.shares - 1:
            _combine(job, slots, state)


@_njit
def _row_of(tiles, tile):
    """The list that a tile belongs to: the last one with `tiles[row] <= tile`."""
    low, high = 0, len(tiles) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if tiles[middle] <= tile:
            low = middle
        else:
            high = middle
    return low


@_njit
def _combine(job, slots, state):
    """Merges the partial results of each list, in the order of its tiles."""
    row = -1
    for slot in range(2 * job.shares):
        if slots[slot] < 0:
            continue
        if slots[slot] == row:
            _merge(job, state, _partial(job, slot))
            continue
        if row >= 0:
            _finish(job, row, state)
        row = slots[slot]
        _copy(_partial(job, slot), state)
    if row >= 0:
        _finish(job, row, state)


@_njit
def _output(job, row):
    out = carray(float32_pointer(job.out + 4 * row * job.group * job.dim), job.group * job.dim)
    return out, carray(float32_pointer(job.lse + 4 * row * job.group), job.group)


@_njit
def _partial(job, slot):
    """State of one piece of a list: for each head `dim` sums, maximum score, sum of weights."""
    size = job.group * (job.dim + LANES)
    return carray(float32_pointer(job.partials + 4 * slot * size), size)


@_njit
def _copy(source, target):
    for i in range(len(source)):
        target[i] = source[i]


@_njit
def _merge(job, state, other):
    dim = job.dim
    for head in range(0, len(state), dim + LANES):
        maximum = other[head + dim]
        if other[head + dim + 1] == 0:  # all scores -inf; of NaN alone, the sum is NaN
            continue
        if maximum > state[head + dim]:
            rescale(state, head, dim, maximum)
        factor = np.float32(math.exp(maximum - state[head + dim]))
        for d in range(dim):
            state[head + d] += factor * other[head + d]
        state[head + dim + 1] += factor * other[head + dim + 1]


@_njit
def _finish(job, row, state):
    dim = job.dim
    out, lse = _output(job, row)
    for i in range(job.group):
        head = i * (dim + LANES)
        total = state[head + dim + 1]
        for d in range(dim):
            out[i * dim + d] = state[head + d] / total
        lse[i] = state[head + dim] + math.log(np.float64(total))
        if math.isnan(lse[i]):
            job.not_finite = 1
