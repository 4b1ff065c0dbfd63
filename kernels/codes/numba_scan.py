"""Weights of rows by their codes: chunks of rows brought together, scored."""

import numba
import numpy as np
from numba import carray

from saap.kernels.cpu.ahead import fetch_ahead, fetch_rows
from saap.kernels.cpu.calls import call, signature_of
from saap.kernels.cpu.memory import (
    copy_bytes,
    float32_pointer,
    int32_pointer,
    uint8_pointer,
)

from .layout import FINE_PLANES
from .numba_job import (
    CHUNK,
    blocks_of,
    chunk_bytes,
    place_of,
    planes_bytes,
    words_of,
)
from .numba_queries import weights_at
from .numba_simd import BLOCK, LANES, WIDEST, fine_planes, scan
from .numba_vectors import exponentials

_njit = numba.njit(error_model="numpy")


def score_entry(stamp):
    """`numba_simd.scan` as a C function, which the others call by its address in `job.score`."""

    def score_chunk(heads, whole, words, plane_bytes, n_words, scales, blocks, count,
                    weights, offsets, factors, out, out_bytes, maxima):  # fmt: skip
        _ = stamp
        scan(heads, whole, words, plane_bytes, n_words, scales, blocks, count,
             weights, offsets, factors, out, out_bytes, maxima)  # fmt: skip

    return score_chunk


SCORE_SIGNATURE = signature_of(14)


@_njit
def weigh_chunk(job, task, chunk, slot, first_head, end_head, space):
    """What heads give a chunk's rows, written where `slot` has room for it.

    By whole codes `exp(score - maximum)`, with their maximum and sum; by coarse codes int32 in the
    order of the scores.
    """
    b, kv_head, n = place_of(job, task)
    first = chunk * CHUNK
    length = min(CHUNK, n - first)
    if length <= 0:
        return
    later = task * job.chunks + chunk + job.ahead
    _fetch_chunk(job, later // job.chunks, later % job.chunks)
    rows = carray(int32_pointer(space + planes_bytes(job.coordinates)), CHUNK)
    for i in range(length):
        rows[i] = first + i
    bring(job, b, kv_head, length, job.whole, space)
    room = job.chunks * CHUNK
    before = slot * job.group
    scores = job.scores + 4 * (before * room + first)
    maxima = job.maxima + 4 * (before * job.chunks + chunk)
    for g in range(first_head, end_head, WIDEST):
        score(job, task, g, min(g + WIDEST, end_head), length, job.whole, space,
              scores + 4 * g * room, 4 * room, maxima + 4 * g * job.chunks,
              4 * job.chunks)  # fmt: skip
    if not job.whole:  # ranked as they are
        return
    vectors = blocks_of(length) * (BLOCK // LANES)
    for g in range(first_head, end_head):
        maximum = carray(float32_pointer(maxima + 4 * g * job.chunks), 1)[0]
        total = carray(float32_pointer(job.totals), (before + g + 1, job.chunks))
        total[before + g, chunk] = exponentials(scores + 4 * g * room, vectors, maximum)


@_njit
def _fetch_chunk(job, task, chunk):
    """Ask for the coarse words that this worker reads next: each plane is a stream of its own, too
    short for a processor to foresee."""
    if task >= job.tasks:
        return
    b, kv_head, n = place_of(job, task)
    first = chunk * CHUNK
    length = min(CHUNK, n - first)
    if length <= 0:
        return
    coarse = job.coarse + b * job.coarse_batch + kv_head * job.coarse_head + 4 * first
    for w in range(words_of(job.coordinates)):
        fetch_ahead(coarse + w * job.coarse_plane, 4 * length)
    fetch_ahead(job.scale + b * job.scale_batch + kv_head * job.scale_head + first, length)


@_njit
def bring(job, b, kv_head, length, whole, space):
    """The words and scales of the listed rows, plane by plane, filled up to whole blocks.

    The list of `length` rows lies in `space` behind the words; its last one fills it up.
    """
    n_words = words_of(job.coordinates)
    rows_place = space + planes_bytes(job.coordinates)
    rows = carray(int32_pointer(rows_place), CHUNK)
    filled = BLOCK * blocks_of(length)
    for i in range(length, filled):
        rows[i] = rows[length - 1]
    first = np.int64(rows[0])
    follow = np.int64(rows[length - 1]) - first == length - 1
    coarse = job.coarse + b * job.coarse_batch + kv_head * job.coarse_head
    scale = job.scale + b * job.scale_batch + kv_head * job.scale_head
    scales = rows_place + 4 * CHUNK
    if follow:
        for w in range(n_words):
            copy_bytes(space + 4 * CHUNK * w, coarse + w * job.coarse_plane + 4 * first,
                       4 * length)  # fmt: skip
        copy_bytes(scales, scale + first, length)
    else:
        last = np.int64(rows[length - 1])
        if whole:
            fine = job.fine + b * job.fine_batch + kv_head * job.fine_head
            fetch_rows(fine, 4 * FINE_PLANES * n_words, rows_place, length)
        for w in range(n_words):
            plane = carray(int32_pointer(coarse + w * job.coarse_plane), last + 1)
            words = carray(int32_pointer(space + 4 * CHUNK * w), CHUNK)
            for i in range(length):
                words[i] = plane[rows[i]]
        each = carray(uint8_pointer(scale), last + 1)
        own = carray(uint8_pointer(scales), CHUNK)
        for i in range(length):
            own[i] = each[rows[i]]
    if whole:
        fine = job.fine + b * job.fine_batch + kv_head * job.fine_head
        fine_planes(fine, FINE_PLANES * n_words, rows_place, blocks_of(length),
                    space + 4 * CHUNK * n_words, 4 * CHUNK)  # fmt: skip


@_njit
def score(job, task, g, end, length, whole, space, out, out_bytes, maxima, maximum_bytes):
    """Scores of up to `WIDEST` heads, g to `end`, with the rows brought; their maxima."""
    heads = end - g
    n_words = words_of(job.coordinates)
    weights, offsets, factors = weights_at(job, task, whole)
    largest = space + chunk_bytes(job.coordinates) - 4 * WIDEST
    call(job.score, (
        heads, whole, space, 4 * CHUNK, n_words,
        space + planes_bytes(job.coordinates) + 4 * CHUNK, blocks_of(length), length,
        weights + g * job.coordinates, offsets + 4 * g, factors + 4 * g,
        out, out_bytes, largest,
    ))  # fmt: skip
    found = carray(float32_pointer(largest), heads)
    for h in range(heads):
        carray(float32_pointer(maxima + h * maximum_bytes), 1)[0] = found[h]
