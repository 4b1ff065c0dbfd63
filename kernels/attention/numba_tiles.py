"""Attention of one list's heads over a run of its tokens, tile by tile.

While keys and values of a tile are read, those of the next one are asked for, row by row: a
core's own prefetcher does not look past the end of a page or of a range.
"""

import math

import numba
import numpy as np
from numba import carray

from saap.kernels.cpu.emitter import LANES
from saap.kernels.cpu.memory import int32_pointer, int64_pointer

from . import numba_wide
from .numba_simd import TILE, accumulate, score, softmax

_njit = numba.njit(error_model="numpy")


@_njit
def rescale(state, head, dim, maximum):
    """Brings the sums of one head, which begin at `head`, to a larger maximum."""
    factor = np.float32(math.exp(state[head + dim] - maximum))
    for d in range(dim):
        state[head + d] *= factor
    state[head + dim] = maximum
    state[head + dim + 1] *= factor


def space_floats(group: int, dim: int) -> int:
    """The `space` of `attend`, in float32: scores, or what `numba_wide` needs."""
    return numba_wide.floats(group, dim) if group >= numba_wide.LEAST_ROWS else group * TILE


@_njit
def attend(job, kind, row, begin, end, rows, space, state):
    """Attention of one list's heads over its tokens from `begin` to `end`, into `state`.

    rows: memory for two tiles' row numbers, int64; space: as `space_floats` says.
    """
    starts = carray(int32_pointer(job.starts + 4 * row * job.ranges), job.ranges)
    lengths = carray(int32_pointer(job.lengths + 4 * row * job.ranges), job.ranges)
    batch, list_head = row // job.list_heads, row % job.list_heads
    kv_head = list_head * job.kv_heads // job.list_heads
    k = job.k + batch * job.k_batch + kv_head * job.k_head
    v = job.v + batch * job.v_batch + kv_head * job.v_head
    q = job.q + 4 * row * job.group * job.dim
    stride = job.dim + LANES
    for i in range(len(state)):
        state[i] = 0
    for i in range(job.group):
        state[i * stride + job.dim] = -np.inf
    wide = job.group >= numba_wide.LEAST_ROWS
    if wide:
        numba_wide.begin(job, q, space)

    at, within = 0, begin
    while within >= lengths[at]:
        within -= lengths[at]
        at += 1
    left, next_rows = end - begin, rows + 8 * TILE
    count, at, within = _locate(starts, lengths, at, within, left, rows)
    while count > 0:
        left -= count
        next_count, at, within = _locate(starts, lengths, at, within, left, next_rows)
        ahead = next_rows if next_count > 0 else rows
        if wide:
            numba_wide.attend_tile(job, kind, k, v, rows, ahead, count, space, state)
        else:
            _attend_tile(job, kind, q, k, v, rows, ahead, count, space, state)
        count = next_count
        rows, next_rows = next_rows, rows
    if wide:
        numba_wide.end(job, space, state)


@_njit
def _attend_tile(job, kind, q, k, v, rows, ahead, count, scores, state):
    _score(job, kind, q, k, rows, ahead, count, scores)
    for i in range(job.group):
        head = i * (job.dim + LANES)
        maximum, total = softmax(
            scores + 4 * TILE * i,
            count,
            np.float32(job.sm_scale),
            np.float32(job.softcap),
            state[head + job.dim],
        )
        if maximum > state[head + job.dim]:
            rescale(state, head, job.dim, maximum)
        state[head + job.dim + 1] += total
    _accumulate(job, kind, scores, v, rows, ahead, count, state.ctypes.data)


@_njit
def _locate(starts, lengths, at, within, left, rows):
    """Writes the rows of a tile of tokens, the last one repeated where `left` ends it.

    Tokens follow from the one that is `within` range `at`. Returns how many there are and where
    the one after them is.
    """
    tile = carray(int64_pointer(rows), TILE)
    wanted = min(left, TILE)
    found = 0
    while found < wanted:
        take = min(lengths[at] - within, wanted - found)
        first = starts[at] + within
        for i in range(take):
            tile[found + i] = first + i
        found += take
        within += take
        if within == lengths[at]:
            at += 1
            within = 0
    for i in range(found, TILE if found else 0):
        tile[i] = tile[found - 1]
    return found, at, within


@_njit
def _score(job, kind, q, k, rows, ahead, count, scores):
    """Scores of all heads; the first of them ask for the keys `ahead`."""
    head = 0
    while head < job.group:
        heads = _heads_at_once(4, job.group - head)
        step = LANES // heads
        query, to = q + 4 * head * job.dim, scores + 4 * head * TILE
        later = ahead if head == 0 else rows
        for i in range(0, count, step):
            here, there = rows + 8 * i, later + 8 * i
            score(kind, heads, query, k, job.k_row, here, there, job.dim, to + 4 * i)
        head += heads


@_njit
def _accumulate(job, kind, scores, v, rows, ahead, count, sums):
    """Weighted values of all heads; the first of them ask for the values `ahead`.

    A row of V is taken whole where registers hold that many sums: see `score` on the order.
    """
    vectors, stride = job.dim // LANES, job.dim + LANES
    width = vectors & -vectors if vectors % LANES else LANES
    head = 0
    while head < job.group:
        heads = _heads_at_once(LANES // width, job.group - head)
        weights, to = scores + 4 * head * TILE, sums + 4 * head * stride
        later = ahead if head == 0 else rows
        for c in range(0, job.dim, width * LANES):
            accumulate(
                kind,
                heads,
                width,
                weights,
                v,
                job.v_row,
                rows,
                later,
                count,
                job.dim,
                c,
                to,
                stride,
            )
        head += heads


@_njit
def _heads_at_once(most, left):
    return 4 if most >= 4 and left >= 4 else 2 if most >= 2 and left >= 2 else 1
