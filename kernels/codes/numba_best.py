"""The k largest of many numbers: their places, or a bit for each, by halving their range."""

import math

import numba
import numpy as np
from numba import carray

from saap.kernels.cpu.emitter import LANES
from saap.kernels.cpu.memory import int32_pointer

from .numba_job import blocks_of
from .numba_simd import BLOCK
from .numba_vectors import (
    count_from,
    mark_from,
    places_from,
    places_of,
    values_from,
    values_within,
)

_PER_BLOCK = BLOCK // LANES
_OCTAVE = 1 << 23
_LEAST = -(2**31)
MOST_SAMPLED = 2048
"""Numbers that a first threshold is guessed from."""

_njit = numba.njit(error_model="numpy")


@_njit
def best(weights, n, k, out, names):
    """The k largest of n weights, float32 not below 0, by their numbers, ascending; of equal ones
    the first. 0 < k <= n.

    Returns the bits of what all of them reach, and how many like it are among them, if others like
    it are not; else n.

    weights: followed by such as are not above any of them, up to a whole block. out: int32, room
    for whole chunks and `LANES` more. names: int32 to call them by; 0: their numbers.
    """
    vectors = blocks_of(n) * _PER_BLOCK
    least, count, above = _threshold(weights, n, k, np.int64(0), np.int64(0), out)
    if count == k and names:
        values_from(weights, names, vectors, least, out)
        return least, n
    found = places_from(weights, vectors, least, out)
    rows = carray(int32_pointer(out), found)
    if count != k:
        _first_of(weights, least, k - above, rows, k)
    if names:
        own = carray(int32_pointer(names), n)
        for i in range(k):
            rows[i] = own[rows[i]]
    return least, n if count == k else k - above


@_njit
def mark_best(keys, n, k, low, bits, space):
    """Set the bits of the k largest of n keys, 0 < k < n; of equal ones of the first. `low`,
    `space`: of `_threshold`."""
    vectors = blocks_of(n) * _PER_BLOCK
    least, count, above = _threshold(keys, n, k, low, np.int64(_LEAST), space)
    if count == k:
        mark_from(keys, vectors, least, bits.ctypes.data)
        return
    mark_from(keys, vectors, least + 1, bits.ctypes.data)
    # By so short a code many rows are equal.
    equal = carray(int32_pointer(space), places_of(keys, vectors, least, space))
    for i in range(min(k - above, len(equal))):
        row = equal[i]
        bits[row >> 3] |= np.uint8(1 << (row & 7))


@_njit
def likely_below(keys, n, k, space):
    """A number that at least k of the keys, and few more, reach: so says a sample of them.

    `_LEAST` where a sample says little. space: int32, room for the sample.
    """
    size = min(MOST_SAMPLED, n // 8 // BLOCK * BLOCK)
    expected = k * size / n
    rank = np.int64(expected + 3 * math.sqrt(expected)) + 4
    if rank >= size:
        return np.int64(_LEAST)
    step = n // size
    all_keys, sample = carray(int32_pointer(keys), n), carray(int32_pointer(space), size)
    for i in range(size):
        sample[i] = all_keys[i * step]
    low, high = np.int64(_LEAST), _largest(space, size) + 1
    while high - low > 1:
        middle = (low + high) // 2
        count = count_from(space, size // LANES, middle)
        if count < rank:
            high = middle
        else:
            low = middle
            if count < rank + rank // 8:
                break
    return low


@_njit
def _threshold(keys, n, k, low, least, space):
    """A number that at least k of the keys reach, and fewer than k exceed; how many reach it, and
    if these are more than k, how many exceed it.

    It is looked for by halving the range of the keys; whenever few are left in it, these are
    brought together.

    keys: int32, followed by such as are not above any of them, up to a whole block; or weights,
    float32 not below 0, whose bits are in their order. least: what every key reaches, 0 for
    weights. low: a guess that at least k keys reach, and few more; where there are fewer it is not
    used. space: int32, room for whole chunks and `LANES` more.
    """
    searched, vectors, held, count = keys, blocks_of(n) * _PER_BLOCK, n, n
    if low > least:
        count = values_within(keys, vectors, low, np.int64(2**31), space)
        if count < k:
            low, count = least, n
        else:
            searched, vectors, held = space, _filled_up(space, count), count
    largest = _largest(searched, held)
    high, above = largest + 1, np.int64(0)  # of the keys, `above` are from `high` on, fewer than k
    gone = above  # of these, so many are not searched any more
    octaves = 4
    while high - low > 1 and count != k:
        middle = (low + high) // 2
        if least == 0 and low == 0 and octaves < 128:
            # Weights fall by the octave: the first guesses go down in steps that double.
            middle = largest - octaves * _OCTAVE
            octaves *= 2
            if middle <= low or middle >= high:
                middle = (low + high) // 2
        reached = gone + count_from(searched, vectors, middle)
        if reached < k:
            high, above = middle, reached
        else:
            low, count = middle, reached
        if 4 * (count - above) < held:
            held = values_within(searched, vectors, low, high, space)
            searched, vectors, gone = space, _filled_up(space, held), above
    return low, count, above


@_njit
def _first_of(keys, least, equal, rows, k):
    """Of the listed rows, whose keys reach `least`, put the k largest in front, in their order; of
    those that are equal to it the first `equal`."""
    bits = carray(int32_pointer(keys), 1 << 31)
    at = 0
    for i in range(len(rows)):
        row = rows[i]
        if bits[row] > least or (bits[row] == least and equal > 0):
            equal -= bits[row] == least
            rows[at] = row
            at += 1
            if at == k:
                break
    return at


@_njit
def _largest(keys, n):
    bits = carray(int32_pointer(keys), n)
    largest = np.int32(_LEAST)
    for i in range(n):
        largest = max(largest, bits[i])
    return np.int64(largest)


@_njit
def _filled_up(numbers, count):
    """Fill so many int32 up to whole blocks with what is below all others; returns how many
    vectors these are."""
    filled = BLOCK * blocks_of(count)
    own = carray(int32_pointer(numbers), filled)
    for i in range(count, filled):
        own[i] = _LEAST
    return filled // LANES
