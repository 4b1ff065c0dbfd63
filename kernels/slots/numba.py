"""Slots on a CPU: look-up, choice and reading in one call, without Python's lock.

What is missing is asked for first, all of it, and then read: so the disk has many requests at a
time, on one thread.
"""

import ctypes
import errno
import functools
import os
from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np
from numba import carray, types
from torch import Tensor

from saap.kernels.cpu.functions import compiled, stamp_of
from saap.kernels.cpu.jobs import job_type
from saap.kernels.cpu.memory import int32_pointer, int64_pointer, uint8_pointer

from .api import Slots

_FIELDS = (
    "starts lengths lists ranges out_starts out_lengths out_row "
    "heads size n_rows slot_of slot_row row_in used spared hands step rows "
    "file first_byte record_bytes head_bytes missing asks "
    "most read failed"  # set by the call
).split()

Job, SIGNATURE = job_type(_FIELDS, ())

_njit = numba.njit(error_model="numpy")
_pread = types.ExternalFunction(
    "pread", types.int64(types.int32, types.int64, types.int64, types.int64)
)
_fadvise = types.ExternalFunction(
    "posix_fadvise", types.int32(types.int32, types.int64, types.int64, types.int32)
)
ASKS = hasattr(os, "posix_fadvise")
_WILL_NEED = np.int32(getattr(os, "POSIX_FADV_WILLNEED", 0))


def fetch(
    slots: Slots, starts: Tensor, lengths: Tensor, room: Tensor,
    file: int, first_byte: int, record_bytes: int, head_bytes: int,
) -> tuple[int, int]:  # fmt: skip
    lists, ranges = starts.shape
    heads, size = slots.row_in.shape
    missing = np.empty((room.shape[2] * lists, 3), dtype=np.int64)
    job = Job(
        starts=starts.data_ptr(), lengths=lengths.data_ptr(), lists=lists, ranges=ranges,
        out_starts=room[0].data_ptr(), out_lengths=room[1].data_ptr(), out_row=room.shape[2],
        heads=heads, size=size, n_rows=slots.slot_of.shape[1], slot_of=slots.slot_of.data_ptr(),
        slot_row=slots.slot_of.stride(0), row_in=slots.row_in.data_ptr(),
        used=slots.used.data_ptr(), spared=slots.spared.data_ptr(), hands=slots.hands.data_ptr(),
        step=slots.step, rows=slots.rows.data_ptr(), file=file, first_byte=first_byte,
        record_bytes=record_bytes, head_bytes=head_bytes, missing=missing.ctypes.data, asks=ASKS,
        failed=-1,
    )  # fmt: skip
    _function()(ctypes.addressof(job))
    if job.failed >= 0:
        raise OSError(errno.EIO, f"ends before row {job.failed}")
    return job.most, job.read


def _entry(stamp: int, asks: bool) -> Callable:
    def entry(jobs):
        _ = stamp
        _place(carray(jobs, 1))
        if asks:
            _ask(carray(jobs, 1))
        _read(carray(jobs, 1))

    return entry


@functools.cache
def _function() -> Callable:
    entries = [_entry(stamp_of(Path(__file__).parent), ASKS)]
    return compiled("rows of a file in slots", SIGNATURE, entries)[0]


@_njit
def _place(jobs):
    """Gives every row that is asked for a slot, and lists those that are to be read."""
    job = jobs[0]
    starts = carray(int32_pointer(job.starts), (job.lists, job.ranges))
    lengths = carray(int32_pointer(job.lengths), (job.lists, job.ranges))
    out_starts = carray(int32_pointer(job.out_starts), (job.lists, job.out_row))
    out_lengths = carray(int32_pointer(job.out_lengths), (job.lists, job.out_row))
    slot_of = carray(int32_pointer(job.slot_of), (job.heads, job.slot_row))
    row_in = carray(int32_pointer(job.row_in), (job.heads, job.size))
    used = carray(int64_pointer(job.used), (job.heads, job.size))
    spared = carray(uint8_pointer(job.spared), (job.heads, job.size))
    hands = carray(int64_pointer(job.hands), job.heads)
    missing = carray(int64_pointer(job.missing), (job.lists * job.out_row, 3))
    per_head = job.lists // job.heads
    for number in range(job.lists):
        head = number // per_head
        for i in range(job.ranges):
            for row in range(starts[number, i], starts[number, i] + lengths[number, i]):
                slot = slot_of[head, row]
                if slot >= 0:
                    used[head, slot] = job.step
                    spared[head, slot] = 1
    most, count = 0, 0
    for number in range(job.lists):
        head = number // per_head
        at = -1
        for i in range(job.ranges):
            for row in range(starts[number, i], starts[number, i] + lengths[number, i]):
                slot = slot_of[head, row]
                if slot < 0:
                    slot = hands[head]
                    while row_in[head, slot] >= 0 and (
                        used[head, slot] == job.step or spared[head, slot] > 0
                    ):
                        if used[head, slot] != job.step:
                            spared[head, slot] = 0
                        slot = slot + 1 if slot + 1 < job.size else 0
                    hands[head] = slot + 1 if slot + 1 < job.size else 0
                    if row_in[head, slot] >= 0:
                        slot_of[head, row_in[head, slot]] = -1
                    slot_of[head, row] = slot
                    row_in[head, slot] = row
                    used[head, slot] = job.step
                    spared[head, slot] = 0
                    missing[count, 0] = head
                    missing[count, 1] = row
                    missing[count, 2] = slot
                    count += 1
                if at >= 0 and out_starts[number, at] + out_lengths[number, at] == slot:
                    out_lengths[number, at] += 1
                else:
                    at += 1
                    out_starts[number, at] = slot
                    out_lengths[number, at] = 1
        most = max(most, at + 1)
    job.most = most
    job.read = count


@_njit
def _offset(job, head, row):
    return job.first_byte + row * job.record_bytes + head * job.head_bytes


@_njit
def _ask(jobs):
    """All that is to be read is asked for, so that the disk has many requests at a time."""
    job = jobs[0]
    missing = carray(int64_pointer(job.missing), (job.lists * job.out_row, 3))
    for i in range(job.read):
        place = _offset(job, missing[i, 0], missing[i, 1])
        _fadvise(np.int32(job.file), place, job.head_bytes, _WILL_NEED)


@_njit
def _read(jobs):
    job = jobs[0]
    slot_of = carray(int32_pointer(job.slot_of), (job.heads, job.slot_row))
    row_in = carray(int32_pointer(job.row_in), (job.heads, job.size))
    missing = carray(int64_pointer(job.missing), (job.lists * job.out_row, 3))
    for i in range(job.read):
        head, row, slot = missing[i, 0], missing[i, 1], missing[i, 2]
        target = job.rows + (head * job.size + slot) * job.head_bytes
        place = _offset(job, head, row)
        if job.failed >= 0 or _pread(np.int32(job.file), target, job.head_bytes, place) != (
            job.head_bytes
        ):
            if job.failed < 0:
                job.failed = row
            slot_of[head, row] = -1  # what was not read is not there
            row_in[head, slot] = -1
