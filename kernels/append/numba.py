"""`PreparedAppend` on a CPU, in one call."""

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

from numba import carray
from torch import Tensor

from saap.kernels.cpu.functions import compiled, stamp_of
from saap.kernels.cpu.jobs import job_type
from saap.kernels.cpu.memory import copy_bytes, int32_pointer, int64_pointer

_Job, _SIGNATURE = job_type("copies n_copies counts n_counts places batch heads".split(), ())

# Numbers that a table of the job has for each buffer, and for each tensor of counts.
_COPY = 8  # to, its bytes by sequence, head and row; from, its bytes by sequence and head; bytes
_COUNT = 5  # place, n, heads, bytes by both
_FROM = 4


class Prepared:
    """Addresses of buffers, and of what counts their rows."""

    def __init__(self, buffers: tuple[Tensor, ...], counts: tuple[Tensor, ...]):
        self._held = buffers, counts  # addresses of theirs follow
        self._copies = _table([
            (
                t.data_ptr(), *(s * t.element_size() for s in t.stride()[:3]),
                0, 0, 0, t.shape[3] * t.element_size(),
            )
            for t in buffers
        ])  # fmt: skip
        self._counts = _table([
            (t.data_ptr(), *t.shape, *(4 * s for s in t.stride())) for t in counts
        ])  # fmt: skip
        batch, heads = buffers[0].shape[:2] if buffers else (0, 0)
        self._places = _table([[0] * batch])
        self._job = _Job(
            copies=ctypes.addressof(self._copies), n_copies=len(buffers),
            counts=ctypes.addressof(self._counts), n_counts=len(counts),
            places=ctypes.addressof(self._places), batch=batch, heads=heads,
        )  # fmt: skip
        self._address = ctypes.addressof(self._job)
        self._kinds = [
            (i * _COPY + _FROM, t.dtype, t.element_size()) for i, t in enumerate(buffers)
        ]
        self._write = _function()

    def __call__(self, rows: Sequence[Tensor], places: Sequence[int]) -> bool:
        """Whether it has written them: not if a row's elements lie apart."""
        copies = self._copies
        for new, (at, dtype, size) in zip(rows, self._kinds, strict=True):
            by_sequence, by_head, _, by_element = new.stride()
            if by_element != 1 or new.dtype is not dtype or new.is_neg():
                return False
            copies[at : at + 3] = new.data_ptr(), size * by_sequence, size * by_head
        self._places[:] = places
        self._write(self._address)
        return True


def _table(rows: Sequence[Sequence[int]]) -> ctypes.Array:
    numbers = [number for row in rows for number in row]
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _entry(stamp):
    """C function to compile; `stamp` becomes a part of the cache's key."""

    def append_entry(jobs):
        _ = stamp
        job = carray(jobs, 1)[0]
        copies = carray(int64_pointer(job.copies), (job.n_copies, _COPY))
        places = carray(int64_pointer(job.places), job.batch)
        for i in range(job.n_copies):
            to, to_batch, to_head, to_row = copies[i, 0], copies[i, 1], copies[i, 2], copies[i, 3]
            new, new_batch, new_head, n_bytes = (
                copies[i, _FROM], copies[i, 5], copies[i, 6], copies[i, 7]
            )  # fmt: skip
            for b in range(job.batch):
                for h in range(job.heads):
                    copy_bytes(to + b * to_batch + h * to_head + places[b] * to_row,
                               new + b * new_batch + h * new_head, n_bytes)  # fmt: skip
        counts = carray(int64_pointer(job.counts), (job.n_counts, _COUNT))
        for i in range(job.n_counts):
            for row in range(counts[i, 1]):
                for head in range(counts[i, 2]):
                    place = counts[i, 0] + row * counts[i, 3] + head * counts[i, 4]
                    carray(int32_pointer(place), 1)[0] += 1

    return append_entry


@functools.cache
def _function() -> Callable:
    return compiled("rows of a step", _SIGNATURE, [_entry(stamp_of(Path(__file__).parent))])[0]
