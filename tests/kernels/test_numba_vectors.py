"""Rows picked by their numbers: each way that a register is packed, against numpy."""

import numba
import numpy as np
import pytest

from saap.kernels.codes import numba_best, numba_vectors
from saap.kernels.codes.numba_job import CHUNK
from saap.kernels.codes.numba_simd import BLOCK
from saap.kernels.cpu.emitter import LANES

WAYS = [numba_vectors._PERMUTES, False] if numba_vectors._PERMUTES else [False]


@pytest.fixture(params=WAYS, ids=lambda permutes: "packed" if permutes else "lane by lane")
def pick(request, monkeypatch):
    """`(numbers, values, least) -> picked`, and the places found through marks."""
    monkeypatch.setattr(numba_vectors, "_PERMUTES", request.param)
    values_from = numba_vectors.values_from
    places_from = numba_vectors.places_from
    mark_from, places_of_marks = numba_vectors.mark_from, numba_vectors.places_of_marks

    @numba.njit
    def values(numbers, own, vectors, least, out):
        return values_from(numbers, own, vectors, least, out)

    @numba.njit
    def places(numbers, vectors, least, out):
        return places_from(numbers, vectors, least, out)

    @numba.njit
    def marked(numbers, vectors, least, marks, out):
        mark_from(numbers, vectors, least, marks)
        return places_of_marks(marks, vectors, out)

    def picked(numbers, own, least):
        n, vectors = len(numbers), len(numbers) // LANES
        outs = [np.full(n + LANES, -7, np.int32) for _ in range(3)]
        marks = np.zeros(n // 8, np.uint8)
        counts = (
            values(numbers.ctypes.data, own.ctypes.data, vectors, least, outs[0].ctypes.data),
            places(numbers.ctypes.data, vectors, least, outs[1].ctypes.data),
            marked(numbers.ctypes.data, vectors, least, marks.ctypes.data, outs[2].ctypes.data),
        )
        return [out[:count] for out, count in zip(outs, counts, strict=True)]

    return picked


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_picked(pick, share):
    generator = np.random.default_rng(0)
    numbers = generator.integers(-100, 100, 40 * BLOCK).astype(np.int32)
    own = generator.integers(0, 10**6, len(numbers)).astype(np.int32)
    least = int(np.quantile(numbers, 1 - share)) if share else 101
    values, places, marked = pick(numbers, own, least)
    expected = (numbers >= least).nonzero()[0]
    assert (values == own[expected]).all()
    assert len(values) == len(expected)
    assert (places == expected).all()
    assert len(places) == len(expected)
    assert (marked == expected).all()
    assert len(marked) == len(expected)


@numba.njit
def best(weights, n, k, out, names):
    numba_best.best(weights, n, k, out, names)


@numba.njit
def mark_best(keys, n, k, low, bits, space):
    numba_best.mark_best(keys, n, k, low, bits, space)


@pytest.mark.parametrize("levels", [1, 2, 7, 100, 10**6])
@pytest.mark.parametrize("n", [1, 33, 512, 1300, 9000])
def test_the_best_and_of_equal_ones_the_first(levels, n):
    """The larger, the more often keys that may still be among them are brought together."""
    generator = np.random.default_rng(levels + n)
    filled = -(-n // BLOCK) * BLOCK
    rows = np.arange(n)
    room = -(-n // CHUNK) * CHUNK
    for k in sorted({1, n // 3 + 1, n - 1, n} - {0}):
        keys = np.full(filled, -(2**30), np.int32)
        keys[:n] = generator.integers(0, levels, n)
        expected = np.sort(np.lexsort((rows, -keys[:n].astype(int)))[:k])
        weights = np.zeros(filled, np.float32)
        weights[:n] = keys[:n] / np.float32(levels)
        out, names = np.zeros((2, room + LANES), np.int32)
        names[:n] = generator.permutation(n)
        best(weights.ctypes.data, n, k, out.ctypes.data, 0)
        assert (out[:k] == expected).all()
        best(weights.ctypes.data, n, k, out.ctypes.data, names.ctypes.data)
        assert (out[:k] == names[expected]).all()
        if k == n:  # all are chosen without a look
            continue
        for low in (-(2**31), int(keys[:n].min()), int(np.median(keys[:n])), levels + 1):
            bits = np.zeros(room // 8, np.uint8)
            bits[0] = 1  # another head's
            mark_best(keys.ctypes.data, n, k, low, bits, out.ctypes.data)
            found = np.unpackbits(bits, bitorder="little").nonzero()[0]
            assert (found == np.union1d(expected, [0])).all(), (k, low)
