"""`add_rest` on a CPU: each KV head on a thread, its moments read once for all its query heads."""

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

from saap.kernels.backends.prepared import Preparation
from saap.kernels.cpu.functions import compiled, run, stamp_of
from saap.kernels.cpu.jobs import job_type, offset_of
from saap.kernels.cpu.memory import fetch_increment, float32_pointer, int32_pointer

from . import normal

_FIELDS = (
    "out lse q spread means n_rows lengths "  # addresses
    "max_tokens tasks n_kv group dim heads ranges "
    "length_batch length_head spread_batch means_batch rows_batch next_task"
).split()
_NEXT_TASK = offset_of(_FIELDS, "next_task")
_Job, _SIGNATURE = job_type(_FIELDS, ("sm_scale", "min_weight"))

_PER_THREAD = 1 << 16  # products that are worth a thread

_njit = numba.njit(error_model="numpy")
_A0, _A1, _A2 = normal.QUANTILE_TOP
_B0, _B1, _B2 = normal.QUANTILE_BOTTOM
_ERFC = np.array(normal.ERFC)
_LEAST, _TINY = normal.LEAST_VISITED, normal.TINY
_LOG_ROOT_2_PI, _LOG_2 = normal.LOG_ROOT_2_PI, normal.LOG_2


def refusal(out: Tensor, q: Tensor) -> str | None:
    if q.device.type != "cpu" or q.dtype != torch.float32 or out.dtype != torch.float32:
        return f"impl 'numba' needs float32 on the CPU; got {q.dtype} on {q.device}"
    return None


def add_rest(
    out, lse, q, moments, lengths, sm_scale: float, max_tokens: int, min_weight: float
) -> tuple[Tensor, Tensor]:
    out, lse, q = (t if t.is_contiguous() else t.contiguous() for t in (out, lse, q))
    return Prepared(q, moments, lengths, sm_scale, max_tokens, min_weight)(out, lse, q)


class Prepared(Preparation):
    """`add_rest` for queries like `like`, again and again over the same tensors."""

    def __init__(
        self, like, moments, lengths, sm_scale: float, max_tokens: int, min_weight: float
    ):
        self._like = like.shape
        self._job, self._threads, self._held = _job_of(
            like, moments, lengths, sm_scale, max_tokens, min_weight
        )

    def fits(self, out: Tensor, lse: Tensor, q: Tensor) -> bool:
        return (
            q.shape == self._like and q.is_contiguous() and out.is_contiguous()
            and lse.is_contiguous() and refusal(out, q) is None
        )  # fmt: skip

    def __call__(self, out: Tensor, lse: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        job = self._job
        job.out, job.lse, job.q = out.data_ptr(), lse.data_ptr(), q.data_ptr()
        job.next_task = 0
        run(_function(), ctypes.addressof(job), min(self._threads, torch.get_num_threads()))
        return out, lse


def _job_of(q, moments, lengths, sm_scale: float, max_tokens: int, min_weight: float):
    """A job without its outputs and queries, threads that are worth it, and what it points to."""
    batch, heads, dim = q.shape
    spread, means = moments.spread, moments.means
    n_kv = means.shape[1]
    if spread.stride()[1:] != (2 * dim * dim, 2 * dim, 1):
        spread = spread.contiguous()
    if means.stride()[1:] != (2 * dim, 1):
        means = means.contiguous()
    if lengths.shape[2] > 1 and lengths.stride(2) != 1:
        lengths = lengths.contiguous()
    job = _Job(
        spread=spread.data_ptr(), means=means.data_ptr(), n_rows=moments.n_rows.data_ptr(),
        lengths=lengths.data_ptr(), tasks=batch * n_kv, n_kv=n_kv, group=heads // n_kv,
        dim=dim, heads=lengths.shape[1], ranges=lengths.shape[2],
        length_batch=4 * lengths.stride(0), length_head=4 * lengths.stride(1),
        spread_batch=2 * spread.stride(0), means_batch=4 * means.stride(0),
        rows_batch=4 * moments.n_rows.stride(0),
        max_tokens=max_tokens, sm_scale=sm_scale, min_weight=min_weight,
    )  # fmt: skip
    products = 2 * dim * dim * heads * batch
    threads = min(batch * n_kv, 1 + products // _PER_THREAD)
    return job, threads, (spread, means, moments.n_rows, lengths)


def _entry(stamp):
    """C function to compile; `stamp` becomes a part of the cache's key."""

    def rest_entry(jobs):
        _ = stamp
        _work(carray(jobs, 1))

    return rest_entry


@_njit
def _work(jobs):
    job = jobs[0]
    counters = jobs.ctypes.data
    even, odd = np.empty(job.dim, np.float32), np.empty(job.dim, np.float32)
    both = np.empty(2 * job.dim, np.float32)
    while True:
        task = fetch_increment(counters + _NEXT_TASK)
        if task >= job.tasks:
            break
        b, kv_head = task // job.n_kv, task % job.n_kv
        n = carray(int32_pointer(job.n_rows + b * job.rows_batch), 1)[0]
        if n <= 0:
            continue
        place = job.spread + b * job.spread_batch + kv_head * 4 * job.dim * job.dim
        spread = carray(int32_pointer(place), (job.dim, job.dim))
        place = job.means + b * job.means_batch + kv_head * 8 * job.dim
        means = carray(float32_pointer(place), 2 * job.dim)
        visited = np.int64(-1)
        for g in range(job.group):
            head = kv_head * job.group + g
            if visited < 0 or job.heads != job.n_kv:
                own = kv_head if job.heads == job.n_kv else head
                visited = _sum(job.lengths + b * job.length_batch + own * job.length_head,
                               job.ranges)  # fmt: skip
            if visited < n:
                _turn(job, b * job.n_kv * job.group + head, spread, even, odd, both)
                _add(job, b * job.n_kv * job.group + head, n, visited, means, both)


@_njit
def _sum(place, n):
    counts = carray(int32_pointer(place), n)
    total = np.int64(0)
    for i in range(n):
        total += counts[i]
    return total


@_njit
def _turn(job, query, spread, even, odd, both):
    """A query's products with the columns of `spread`, two numbers of bfloat16 in a word."""
    dim = job.dim
    q = carray(float32_pointer(job.q + 4 * query * dim), dim)
    scale = np.float32(job.sm_scale)
    for j in range(dim):
        even[j] = odd[j] = np.float32(0.0)
    for i in range(dim):
        factor = scale * q[i]
        row = spread[i]
        for j in range(dim):
            even[j] += factor * np.int32(row[j] << 16).view(np.float32)
            odd[j] += factor * np.int32(row[j] & -65536).view(np.float32)
    for j in range(dim):
        both[2 * j], both[2 * j + 1] = even[j], odd[j]


@_njit
def _add(job, query, n, visited, means, both):
    """The rest of one query head, added to its output."""
    dim = job.dim
    q = carray(float32_pointer(job.q + 4 * query * dim), dim)
    scale = np.float32(job.sm_scale)
    mean, variance = 0.0, 0.0
    for i in range(dim):
        factor = scale * q[i]
        mean += factor * means[i]
        variance += factor * both[i]
    variance = max(variance, _TINY)
    deviation = math.sqrt(variance)
    out = carray(float32_pointer(job.out + 4 * query * dim), dim)
    lse = carray(float32_pointer(job.lse + 4 * query), 1)
    counted = max(np.float64(visited), _LEAST)
    most = (job.n_kv * job.group // job.heads) / counted
    if job.min_weight > 0 and visited < job.max_tokens:
        most = job.min_weight
    z = _quantile(counted / n)
    if lse[0] > -np.inf:
        z = min(z, (lse[0] + math.log(most) - mean) / deviation)
    x = z - deviation
    log_below = _log_cdf(x)
    log_rest = math.log(n) + mean + variance / 2 + log_below
    share = 1 - math.exp(-x * x / 2 - _LOG_ROOT_2_PI - log_below) / deviation
    check = log_rest + share
    for j in range(dim):
        check += means[dim + j] + share * both[dim + j]
    if not abs(check) < np.inf:
        return
    top = max(np.float64(lse[0]), log_rest)
    before, added = math.exp(lse[0] - top), math.exp(log_rest - top)
    total = before + added
    for j in range(dim):
        value = means[dim + j] + share * both[dim + j]
        kept = before * out[j] if before > 0 else 0.0
        out[j] = (kept + added * value) / total
    lse[0] = top + math.log(total)


@_njit
def _quantile(above):
    small = max(min(above, 1 - above), 1e-30)
    s = math.sqrt(-2 * math.log(small))
    z = s - (_A0 + s * (_A1 + s * _A2)) / (1 + s * (_B0 + s * (_B1 + s * _B2)))
    return -z if above > 0.5 else z


@_njit
def _log_cdf(x):
    size = abs(x) / math.sqrt(2.0)
    t = 1 / (1 + size / 2)
    series = _ERFC[-1]
    for i in range(len(_ERFC) - 2, -1, -1):
        series = _ERFC[i] + t * series
    log_tail = math.log(t) + series - size * size - _LOG_2
    return math.log1p(-math.exp(log_tail)) if x > 0 else log_tail


@functools.cache
def _function() -> Callable:
    stamp = stamp_of(Path(__file__).parent)
    return compiled("estimate of the rest", _SIGNATURE, [_entry(stamp)])[0]
