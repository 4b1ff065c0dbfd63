"""The candidates by coarse score, scored by all of their code, and the best of them as ranges."""

import math

import numba
import numpy as np
from numba import carray

from saap.kernels.cpu.memory import (
    fetch_increment,
    float32_pointer,
    int32_pointer,
    int64_pointer,
    uint8_pointer,
)
from saap.kernels.routing.numba_simd import ordered_bits

from .layout import BINS, FINE_PLANES, PER_WORD, STEP_2, STEP_4
from .layout import BINS_PER_UNIT as PER_UNIT
from .numba_scan import NEXT_TASK, NEXT_WORKER, place_of, power
from .numba_words import add_bits, add_twos

BINS_PER_UNIT, LAST_BIN = np.float32(PER_UNIT), np.float32(BINS - 1)
_SHIFTS = (21, 10, 0)
_ONE = np.float32(1.0)

_njit = numba.njit(error_model="numpy")


@_njit
def fine_words(coordinates):
    return FINE_PLANES * coordinates // (4 * PER_WORD)


@_njit
def workspace_bytes(most, candidates, group, coordinates):
    """Bytes of memory that a worker needs, a multiple of 8."""
    floats = most + candidates * (3 + group + fine_words(coordinates))
    return 8 * BINS + 4 * (floats + floats % 2)


def entry(stamp):
    """C function to compile; `stamp` becomes a part of the cache's key."""

    def choose_entry(jobs):
        _ = stamp
        _work(carray(jobs, 1))

    return choose_entry


@_njit
def _work(jobs):
    job = jobs[0]
    counters = jobs.ctypes.data
    worker = fetch_increment(counters + NEXT_WORKER)
    space = job.workspace
    space += workspace_bytes(job.most, job.candidates, job.group, job.coordinates) * worker
    counts = carray(int64_pointer(job.counts), job.tasks)
    while True:
        task = fetch_increment(counters + NEXT_TASK)
        if task >= job.tasks:
            break
        counts[task] = _choose(job, task, space)


@_njit
def _choose(job, task, space):
    b, kv_head, n = place_of(job, task)
    histogram = carray(int64_pointer(space), BINS)
    at = space + 8 * BINS
    keys = carray(float32_pointer(at), job.most)
    at += 4 * job.most
    rows = carray(int32_pointer(at), job.candidates)
    at += 4 * job.candidates
    weights = carray(float32_pointer(at), job.candidates)
    at += 4 * job.candidates
    sums = carray(float32_pointer(at), (job.group, job.candidates))
    at += 4 * job.candidates * job.group
    code = carray(float32_pointer(at), job.candidates)
    at += 4 * job.candidates
    words = carray(int32_pointer(at), (fine_words(job.coordinates), job.candidates))

    n_candidates = min(job.candidates, n)
    if n_candidates < n and job.max_tokens < n:
        _coarse_keys(job, task, n, keys)
        _best_by_bin(keys, n, n_candidates, histogram, rows)
    else:
        n_candidates = n
        for r in range(n):
            rows[r] = r
    if job.max_tokens < n_candidates:
        _fine_scores(job, task, b, kv_head, rows, n_candidates, sums, code, words)
        _add_softmax(job.group, n_candidates, sums, code, weights)
        kept = job.max_tokens
        _best(weights, n_candidates, kept, histogram, words[0])
        for i in range(kept):
            rows[i] = rows[words[0, i]]
    else:
        kept = n_candidates
    place = task // job.heads * job.out_batch + task % job.heads * job.out_head
    starts = carray(int32_pointer(job.starts + place), job.capacity)
    lengths = carray(int32_pointer(job.lengths + place), job.capacity)
    found, end = 0, np.int64(-1)
    for i in range(kept):
        row = np.int64(rows[i])
        if row == end:
            lengths[found - 1] += 1
        else:
            starts[found], lengths[found] = job.first_row + row, 1
            found += 1
        end = row + 1
    for i in range(found, job.capacity):
        starts[i] = lengths[i] = 0
    return found


@_njit
def _coarse_keys(job, task, n, keys):
    """The logarithm of a row's largest weight over the heads, by its coarse code."""
    scores = carray(float32_pointer(job.scores + 4 * task * job.group * job.most),
                    (job.group, job.most))  # fmt: skip
    place = 4 * task * job.group * job.chunks
    maxima = carray(float32_pointer(job.maxima + place), (job.group, job.chunks))
    totals = carray(float32_pointer(job.totals + place), (job.group, job.chunks))
    for g in range(job.group):
        best = np.float32(-np.inf)
        for chunk in range(job.chunks):
            best = max(best, maxima[g, chunk])
        total = 0.0
        for chunk in range(job.chunks):
            if totals[g, chunk] > 0:
                total += totals[g, chunk] * math.exp(maxima[g, chunk] - best)
        lse = best + np.float32(math.log(total))
        if g == 0:
            for r in range(n):
                keys[r] = scores[g, r] - lse
        else:
            for r in range(n):
                keys[r] = max(keys[r], scores[g, r] - lse)


@_njit
def _best_by_bin(keys, n, k, histogram, out):
    """Numbers of the k largest of n keys, ascending, told apart to 1 / `BINS_PER_UNIT`.

    The keys are at most 0. Of those in one bin the first are taken, and NaN is in the last: it
    does not matter which of the last candidates are let through, and one pass is enough.
    """
    for i in range(BINS):
        histogram[i] = 0
    for i in range(n):
        histogram[_bin(keys[i])] += 1
    edge, above = np.int64(0), np.int64(0)
    while above + histogram[edge] < k:
        above += histogram[edge]
        edge += 1
    left, found = k - above, 0
    for i in range(n):
        own = _bin(keys[i])
        if own < edge or (own == edge and left > 0):
            left -= own == edge
            out[found] = i
            found += 1


@_njit
def _bin(key):
    distance = -key * BINS_PER_UNIT
    return np.int64(distance) if distance < LAST_BIN else np.int64(BINS - 1)


@_njit
def _fine_scores(job, task, b, kv_head, rows, n, sums, code, words):
    """Scores of the candidates by all of their code; they are brought together first."""
    quarter = job.coordinates // 4
    n_words, n_fine = quarter // PER_WORD, fine_words(job.coordinates)
    place = job.fine + b * job.fine_batch + kv_head * job.fine_head
    for i in range(n):
        own = carray(int32_pointer(place + 4 * n_fine * np.int64(rows[i])), n_fine)
        for w in range(n_fine):
            words[w, i] = own[w]
    q = carray(float32_pointer(job.q + 4 * task * job.group * job.coordinates),
               (job.group, job.coordinates))  # fmt: skip
    group = job.group
    for g in range(group):
        zero = np.float32(0.0)
        for d in range(2 * quarter):
            zero -= q[g, d] * np.float32(7.5 * STEP_4)
        for d in range(2 * quarter, job.coordinates):
            zero -= q[g, d] * np.float32(1.5 * STEP_2)
        for i in range(n):
            sums[g, i] = zero
    one, two = np.float32(STEP_4), np.float32(STEP_2)
    for w in range(n_words):
        at = w * PER_WORD
        second, third, fourth = quarter + at, 2 * quarter + at, 3 * quarter + at
        add_twos(words[w], q, at, one, n, group, sums)
        add_twos(words[n_words + w], q, second, 2 * one, n, group, sums)
        add_bits(words[2 * n_words + w], q, second, third, one, two, n, group, sums)
        add_twos(words[3 * n_words + w], q, fourth, two, n, group, sums)
    # The fine words are done with: the coarse ones take the place of the first.
    place = job.coarse + b * job.coarse_batch + kv_head * job.coarse_head
    for w in range(n_words):
        at = w * PER_WORD
        upper = carray(int32_pointer(place + w * job.coarse_plane), job.most)
        signs = carray(int32_pointer(place + (n_words + w) * job.coarse_plane), job.most)
        for i in range(n):
            words[0, i] = upper[rows[i]]
            words[1, i] = signs[rows[i]]
        add_twos(words[0], q, at, 4 * one, n, group, sums)
        add_bits(words[1], q, quarter + at, 2 * quarter + at, 8 * one, 2 * two, n, group, sums)
    scale = carray(uint8_pointer(job.scale + b * job.scale_batch + kv_head * job.scale_head),
                   job.most)  # fmt: skip
    table = carray(float32_pointer(job.table), 256)
    for i in range(n):
        code[i] = table[scale[rows[i]]]
    for g in range(job.group):
        for i in range(n):
            sums[g, i] *= code[i]


@_njit
def _add_softmax(group, n, sums, powers, weights):
    """The sum over the heads of the softmax of their scores."""
    for i in range(n):
        weights[i] = np.float32(0.0)
    for g in range(group):
        best = np.float32(-np.inf)
        for i in range(n):
            best = max(best, sums[g, i])
        for i in range(n):
            powers[i] = power(sums[g, i] - best)
        total = np.float32(0.0)
        for i in range(n):
            total += powers[i]
        share = _ONE / total
        for i in range(n):
            weights[i] += powers[i] * share


@_njit
def _best(keys, n, k, histogram, out):
    """Numbers of the k largest of n keys, ascending; of equal ones the first."""
    known, known_shift, taken = np.int64(0), 32, np.int64(0)
    for shift in _SHIFTS:
        for i in range(BINS):
            histogram[i] = 0
        mask = BINS - 1 if shift else BINS // 2 - 1
        for i in range(n):
            bits = ordered_bits(keys[i])
            if known_shift == 32 or bits >> known_shift == known:
                histogram[(bits >> shift) & mask] += 1
        at = np.int64(mask)
        while taken + histogram[at] < k:
            taken += histogram[at]
            at -= 1
        known = at if known_shift == 32 else (known << (known_shift - shift)) | at
        known_shift = shift
    found, equal = 0, k - taken
    for i in range(n):
        bits = ordered_bits(keys[i])
        if bits > known or (bits == known and equal > 0):
            if bits == known:
                equal -= 1
            out[found] = i
            found += 1
            if found == k:
                break
