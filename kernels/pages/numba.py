"""Choice of pages on a CPU: one task for each request and KV head, keys read where they lie."""

import ctypes
import functools
import math
from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np
import torch
from numba import carray
from torch import Tensor

from saap.kernels.cpu.functions import compiled, run, stamp_of
from saap.kernels.cpu.jobs import job_type, offset_of
from saap.kernels.cpu.memory import fetch_increment, float32_pointer, int32_pointer

FIELDS = (
    "q keys table lens counts out peaks weights "  # addresses
    "tasks kv_heads group dim page sinks window most table_row out_row out_head "
    "block_stride head_stride next_task"
).split()
NEXT_TASK = offset_of(FIELDS, "next_task")
Job, SIGNATURE = job_type(FIELDS, ("unused",))

MOST_PAGE = 128
"""Tokens of a page at most: the scores of one lie in a small buffer."""

FORCED = np.float32(3e38)

_njit = numba.njit(error_model="numpy", fastmath={"contract", "reassoc", "nsz"})


def entry(stamp):
    """C function to compile; `stamp` becomes a part of the cache's key."""

    def pages_entry(jobs):
        _ = stamp
        _work(carray(jobs, 1))

    return pages_entry


@_njit
def _work(jobs):
    job = jobs[0]
    counters = jobs.ctypes.data
    scores = np.empty(MOST_PAGE, np.float32)
    while True:
        task = fetch_increment(counters + NEXT_TASK)
        if task >= job.tasks:
            break
        _choose(job, task, scores)


@_njit
def _choose(job, task, scores):
    r, h = task // job.kv_heads, task % job.kv_heads
    length = np.int64(carray(int32_pointer(job.lens), r + 1)[r])
    count = np.int64(carray(int32_pointer(job.counts), r + 1)[r])
    pages = (length + job.page - 1) // job.page
    table = carray(int32_pointer(job.table + 4 * r * job.table_row), pages)
    out = carray(int32_pointer(job.out + 4 * (r * job.out_row + h * job.out_head)), count)
    if count == pages:
        for p in range(pages):
            out[p] = table[p] * job.kv_heads + h
        return
    weights = carray(float32_pointer(job.weights + 4 * task * job.most), pages)
    peaks = carray(float32_pointer(job.peaks + 4 * task * job.group * job.most),
                   (job.group, job.most))  # fmt: skip
    q = carray(float32_pointer(job.q + 4 * task * job.group * job.dim), (job.group, job.dim))
    own = scores[: job.page]
    for p in range(pages):
        place = job.keys + 4 * (np.int64(table[p]) * job.block_stride + h * job.head_stride)
        keys = carray(float32_pointer(place), (job.dim, job.page))
        held = min(job.page, length - p * job.page)
        for g in range(job.group):
            own[:] = np.float32(0.0)
            for d in range(job.dim):
                factor = q[g, d]
                for i in range(job.page):
                    own[i] += factor * keys[d, i]
            peak = own[0]
            for i in range(1, held):
                peak = max(peak, own[i])
            peaks[g, p] = peak
    weights[:] = np.float32(0.0)
    for g in range(job.group):
        largest, total = peaks[g, 0], np.float32(0.0)
        for p in range(pages):
            largest = max(largest, peaks[g, p])
        for p in range(pages):
            share = np.float32(math.exp(peaks[g, p] - largest))
            peaks[g, p] = share
            total += share
        for p in range(pages):
            weights[p] += peaks[g, p] / total
    for p in range(pages):
        if p < job.sinks or p >= pages - job.window:
            weights[p] = FORCED
        elif not weights[p] >= 0:  # NaN
            weights[p] = 0.0
    _write(weights, table, count, job.kv_heads, h, out)


@_njit
def _write(weights, table, count, kv_heads, h, out):
    """The last page and the `count - 1` heaviest of those before it, ascending."""
    pages = len(weights)
    bits = weights.view(np.int32)
    low, high = np.int64(0), np.int64(0x7F800000)  # at least count - 1 from low on
    while high - low > 1:
        middle = (low + high) // 2
        found = 0
        for p in range(pages - 1):
            found += bits[p] >= middle
        if found >= count - 1:
            low = middle
        else:
            high = middle
    above = 0
    for p in range(pages - 1):
        above += bits[p] > low
    equal, at = count - 1 - above, 0
    for p in range(pages - 1):
        if bits[p] > low or (bits[p] == low and equal > 0):
            equal -= bits[p] == low
            out[at] = table[p] * kv_heads + h
            at += 1
    out[count - 1] = table[pages - 1] * kv_heads + h


def select_pages(q, keys, block_table, seq_lens, counts, sink_pages, window_pages, out) -> None:
    """`q [R, Hq, D]` is scaled already and contiguous."""
    _, n_kv, dim, page = keys.shape
    if page > MOST_PAGE:
        raise ValueError(f"a page must hold at most {MOST_PAGE} tokens; got {page}")
    requests, n_heads, _ = q.shape
    tasks, group, most = requests * n_kv, n_heads // n_kv, block_table.shape[1]
    peaks: Tensor = torch.empty(tasks, group, most)
    weights: Tensor = torch.empty(tasks, most)
    job = Job(
        q=q.data_ptr(), keys=keys.data_ptr(), table=block_table.data_ptr(),
        lens=seq_lens.data_ptr(), counts=counts.data_ptr(), out=out.data_ptr(),
        peaks=peaks.data_ptr(), weights=weights.data_ptr(), tasks=tasks, kv_heads=n_kv,
        group=group, dim=dim, page=page, sinks=sink_pages, window=max(1, window_pages),
        most=most, table_row=block_table.stride(0), out_row=out.stride(0),
        out_head=out.stride(1), block_stride=keys.stride(0), head_stride=keys.stride(1),
    )  # fmt: skip
    run(_function(), ctypes.addressof(job), min(torch.get_num_threads(), tasks))


@functools.cache
def _function() -> Callable:
    return compiled("choice of pages", SIGNATURE, [entry(stamp_of(Path(__file__).parent))])[0]
