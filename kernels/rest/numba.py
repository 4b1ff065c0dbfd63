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
from saap.kernels.cpu.memory import (
    fetch_increment,
    float32_pointer,
    int32_pointer,
    int64_pointer,
    uint16_pointer,
)

from . import normal

_FIELDS = (
    "out lse q spread means keys values sizes n_rows lengths "  # addresses
    "scored_lse scored_mean n_scored "
    "max_tokens tasks n_kv group dim clusters heads ranges "
    "length_batch length_head spread_batch means_batch keys_batch values_batch sizes_batch "
    "rows_batch scored_mean_batch scored_heads n_best one_of next_task"
).split()
_NEXT_TASK = offset_of(_FIELDS, "next_task")
_Job, _SIGNATURE = job_type(_FIELDS, ("sm_scale", "min_weight"))

_PER_THREAD = 1 << 16  # products that are worth a thread

_njit = numba.njit(error_model="numpy")
_A0, _A1, _A2 = normal.QUANTILE_TOP
_B0, _B1, _B2 = normal.QUANTILE_BOTTOM
(_ERFC_0, _ERFC_1, _ERFC_2, _ERFC_3, _ERFC_4, _ERFC_5, _ERFC_6, _ERFC_7, _ERFC_8, _ERFC_9) = (
    np.float32(c) for c in normal.ERFC
)
_PER_ROOT_2_PI = np.float32(math.exp(-normal.LOG_ROOT_2_PI))
_LEAST, _TINY, _REACH = normal.LEAST_VISITED, normal.TINY, normal.REACH
_STEPS, _NEAR = 40, 1e-5  # of a search for a threshold: at most so many, until it is so near


def refusal(out: Tensor, q: Tensor) -> str | None:
    if q.device.type != "cpu" or q.dtype != torch.float32 or out.dtype != torch.float32:
        return f"impl 'numba' needs float32 on the CPU; got {q.dtype} on {q.device}"
    return None


def add_rest(
    out, lse, q, moments, lengths, scored, sm_scale: float, max_tokens: int, min_weight: float
) -> tuple[Tensor, Tensor]:
    out, lse, q = (t.resolve_neg().contiguous() for t in (out, lse, q))
    return Prepared(q, moments, lengths, scored, sm_scale, max_tokens, min_weight)(out, lse, q)


class Prepared(Preparation):
    """`add_rest` for queries like `like`, again and again over the same tensors."""

    def __init__(
        self, like, moments, lengths, scored, sm_scale: float, max_tokens: int, min_weight: float
    ):
        self._like = like.shape
        self._job, self._threads, self._held = _job_of(
            like, moments, lengths, scored, sm_scale, max_tokens, min_weight
        )

    def fits(self, out: Tensor, lse: Tensor, q: Tensor) -> bool:
        return (
            q.shape == self._like and q.is_contiguous() and not q.is_neg()
            and out.is_contiguous() and lse.is_contiguous() and refusal(out, q) is None
        )  # fmt: skip

    def __call__(self, out: Tensor, lse: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        job = self._job
        job.out, job.lse, job.q = out.data_ptr(), lse.data_ptr(), q.data_ptr()
        job.next_task = 0
        run(_function(), ctypes.addressof(job), min(self._threads, torch.get_num_threads()))
        return out, lse


def _job_of(q, moments, lengths, scored, sm_scale: float, max_tokens: int, min_weight: float):
    """A job without its outputs and queries, threads that are worth it, and what it points to."""
    batch, heads, dim = q.shape
    n_kv, clusters = moments.keys.shape[1], moments.keys.shape[3]
    parts = moments.parts()
    if lengths.shape[2] > 1 and lengths.stride(2) != 1:
        lengths = lengths.contiguous()
    places = {name: part.data_ptr() for name, part in parts.items()}
    strides = {f"{n}_batch": part.stride(0) * part.element_size() for n, part in parts.items()}
    job = _Job(
        n_rows=moments.n_rows.data_ptr(),
        lengths=lengths.data_ptr(), tasks=batch * n_kv, n_kv=n_kv, group=heads // n_kv,
        dim=dim, clusters=clusters, heads=lengths.shape[1], ranges=lengths.shape[2],
        length_batch=4 * lengths.stride(0), length_head=4 * lengths.stride(1),
        rows_batch=4 * moments.n_rows.stride(0),
        max_tokens=max_tokens, sm_scale=sm_scale, min_weight=min_weight, **places, **strides,
    )  # fmt: skip
    known = _known(job, scored)
    products = 2 * dim * (dim + clusters) * heads * batch
    threads = min(batch * n_kv, 1 + products // _PER_THREAD)
    return job, threads, (parts, moments.n_rows, lengths, known)


def _known(job, scored) -> tuple[Tensor, ...]:
    """Tell the job what is known of rows that were scored; the tensors that it points to."""
    if scored is None:
        return ()
    parts = scored.lse, scored.mean, scored.n_scored
    held = tuple(t.resolve_neg().contiguous() for t in parts)
    job.scored_lse, job.scored_mean, job.n_scored = (t.data_ptr() for t in held)
    _, mean, n_scored = held
    job.scored_mean_batch = 4 * mean.stride(0) if len(mean) > 1 else 0
    job.scored_heads, job.n_best = n_scored.shape[1], scored.n_best
    job.one_of = scored.one_of or 0
    return held


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
    dim, clusters = job.dim, job.clusters
    even, odd = np.empty(dim, np.float32), np.empty(dim, np.float32)
    both, scores = np.empty(2 * dim, np.float32), np.empty(clusters, np.float32)
    weights, tilts = np.empty(clusters, np.float32), np.empty(clusters, np.float32)
    behind = np.empty(clusters, np.float32)
    value = np.empty(dim, np.float32)
    while True:
        task = fetch_increment(counters + _NEXT_TASK)
        if task >= job.tasks:
            break
        b, kv_head = task // job.n_kv, task % job.n_kv
        n = carray(int32_pointer(job.n_rows + b * job.rows_batch), 1)[0]
        if n <= 0:
            continue
        place = job.spread + b * job.spread_batch + kv_head * 4 * dim * dim
        spread = carray(int32_pointer(place), (dim, dim))
        place = job.means + b * job.means_batch + kv_head * 8 * dim
        means = carray(float32_pointer(place), 2 * dim)
        place = job.keys + b * job.keys_batch + kv_head * 2 * dim * clusters
        keys = carray(uint16_pointer(place), (dim, clusters))
        place = job.values + b * job.values_batch + kv_head * 2 * dim * clusters
        values = carray(uint16_pointer(place), (clusters, dim))
        place = job.sizes + b * job.sizes_batch + kv_head * 8 * clusters
        sizes = carray(float32_pointer(place), (2, clusters))
        visited = np.int64(-1)
        for g in range(job.group):
            head = kv_head * job.group + g
            if visited < 0 or job.heads != job.n_kv:
                own = kv_head if job.heads == job.n_kv else head
                visited = _sum(job.lengths + b * job.length_batch + own * job.length_head,
                               job.ranges)  # fmt: skip
            if visited < n:
                query = b * job.n_kv * job.group + head
                _turn(job, query, spread, even, odd, both)
                _score(job, query, keys, scores)
                log_rest, tilt = _estimate(
                    job, query, n, visited, means, sizes, both, scores, weights, tilts, behind
                )
                _average(weights, values, means, tilt, both, value)
                _add(job, query, log_rest, tilt, value)


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
def _score(job, query, keys, scores):
    """A query's products with what each cluster's mean key differs by from the mean of all."""
    q = carray(float32_pointer(job.q + 4 * query * job.dim), job.dim)
    scale = np.float32(job.sm_scale)
    for c in range(job.clusters):
        scores[c] = np.float32(0.0)
    for i in range(job.dim):
        factor = scale * q[i]
        row = keys[i]
        for c in range(job.clusters):
            scores[c] += factor * _widened(row[c])


@_njit
def _widened(bits):
    """A number of bfloat16 as float32."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@_njit
def _estimate(job, query, n, visited, means, sizes, both, scores, weights, tilts, behind):
    """Log-sum-exp of the rest of a query head, and the factor of `Cov(v, k) q` in its mean value.

    scores: of the clusters; they are written over. weights: becomes the clusters' parts in the
    rest. tilts, behind: room for as many numbers.
    """
    dim, clusters = job.dim, job.clusters
    q = carray(float32_pointer(job.q + 4 * query * dim), dim)
    lse = carray(float32_pointer(job.lse + 4 * query), 1)[0]
    scale = np.float32(job.sm_scale)
    mean, variance = 0.0, 0.0
    for i in range(dim):
        factor = scale * q[i]
        mean += factor * means[i]
        variance += factor * both[i]
    of_all = variance
    for c in range(clusters):
        of_all += sizes[0, c] * scores[c] ** 2
    counted = max(np.float64(visited), _LEAST)
    most = (job.n_kv * job.group // job.heads) / counted
    by_weight = job.min_weight > 0 and visited < job.max_tokens
    if by_weight:
        most = job.min_weight
    deviation = math.sqrt(max(of_all, _TINY))
    log_of_all = math.log(n) + mean
    if not job.scored_lse:
        bound = np.float64(lse) + math.log(most) - mean if lse > -np.inf else np.inf
        most_score = min(_quantile(counted / n) * deviation, bound)
        _weigh_below(np.float32(most_score), np.float32(variance), sizes, scores, weights, tilts)
        log_rest = log_of_all + _log_sum(sizes, scores, weights)
    else:
        seen, best, log_rest = _scored(job, query, n, q)
        known = np.float64(lse)
        if lse > -np.inf:  # not more than as many rows can have of which none has more than `most`
            others = max(seen - visited, 0.0) * most
            if by_weight:
                others = others / (1 - others) if others < 1 else np.inf
            log_rest = min(log_rest, known + math.log(others) if others > 0 else -np.inf)
        known = _log_of_both(known, log_rest)
        bound = known + math.log(most) - mean if known > -np.inf else np.inf
        most_score = min(_quantile(max(best, _LEAST) / n) * deviation, bound)
        if seen < n:
            behind[:] = scores
            _weigh_below(
                np.float32(most_score), np.float32(variance), sizes, behind, weights, tilts
            )
            unseen = _log_sum(sizes, behind, weights) + math.log((n - seen) / (n - best))
            log_rest = _log_of_both(log_rest, log_of_all + unseen)
        _weigh_as_much(
            log_rest - log_of_all, most_score, variance, sizes, scores, behind, weights, tilts
        )
    total, tilt = 0.0, 0.0
    for c in range(clusters):
        total += weights[c]
        tilt += weights[c] * tilts[c] if weights[c] > 0 else np.float32(0.0)
    for c in range(clusters):
        weights[c] /= np.float32(total)
    return log_rest, tilt / total


@_njit
def _weigh_as_much(log_sum, score, variance, sizes, scores, behind, weights, tilts):
    """As `_weigh_below` and `_log_sum`, below the score at which this is the log of the sum.

    `score`: where to begin. Newton's steps, and halving where these lead astray.
    """
    low, high = np.inf, -np.inf
    for c in range(len(scores)):
        own = max(variance * sizes[1, c], _TINY)
        reach = _REACH * math.sqrt(own)
        low, high = min(low, scores[c] - reach), max(high, scores[c] + own + reach)
    score = min(max(score, low), high)
    for _ in range(_STEPS):
        behind[:] = scores
        _weigh_below(np.float32(score), np.float32(variance), sizes, behind, weights, tilts)
        over = _log_sum(sizes, behind, weights) - log_sum
        if abs(over) < _NEAR:
            break
        low, high = (low, score) if over > 0 else (score, high)
        total, slope = 0.0, 0.0
        for c in range(len(scores)):
            total += weights[c]
            if weights[c] > 0 and sizes[1, c] > 0:
                slope += weights[c] * (1 - tilts[c] / sizes[1, c])
        score = score - over * total / slope if slope > 0 else low
        if not low < score < high:
            score = (low + high) / 2


@_njit
def _scored(job, query, n, q):
    """How many of n rows were scored, how many of them are the best ones of a query head, and the
    log-sum-exp of its scores with those of them that were not chosen."""
    heads, dim = job.n_kv * job.group, job.dim
    b, head = query // heads, query % heads
    place = job.n_scored + 8 * (b * job.scored_heads + head * job.scored_heads // heads)
    seen = np.float64(carray(int64_pointer(place), 1)[0])
    best = np.float64(job.n_best)
    if job.one_of:
        best = max(best, np.float64((n + job.one_of - 1) // job.one_of))
    place = job.scored_mean + b * job.scored_mean_batch + 4 * dim * (head // job.group)
    mean = carray(float32_pointer(place), dim)
    shared = 0.0
    for i in range(dim):
        shared += np.float32(job.sm_scale) * q[i] * mean[i]
    lse = np.float64(carray(float32_pointer(job.scored_lse + 4 * query), 1)[0])
    return seen, min(best, seen), lse + shared


@_njit
def _log_sum(sizes, scores, weights):
    """Log of the sum of the clusters' parts, `weights[c] exp(scores[c])`; weights become these,
    over the largest."""
    top = np.float32(-np.inf)
    for c in range(len(scores)):
        top = max(top, scores[c] if sizes[0, c] > 0 else np.float32(-np.inf))
    for c in range(len(scores)):
        weights[c] *= _exp(min(scores[c] - top, np.float32(0.0)))
    total = 0.0
    for c in range(len(scores)):
        total += weights[c]
    return top + math.log(total)


@_njit
def _log_of_both(a, b):
    top = max(a, b)
    if top == -np.inf:
        return top
    return top + math.log(math.exp(a - top) + math.exp(b - top))


@_njit
def _weigh_below(most, variance, sizes, scores, weights, tilts):
    """`below` of the reference for all clusters, in a form that vectors can do.

    The part of a cluster in the rest becomes `weights[c] exp(scores[c])`, its share of the rows
    counted in, and the factor of `Cov(v, k) q` in its mean value `tilts[c]`.
    """
    half, one = np.float32(0.5), np.float32(1.0)
    for c in range(len(scores)):
        own = max(variance * sizes[1, c], np.float32(_TINY))
        deviation = np.sqrt(own)
        z = (most - scores[c]) / deviation
        x = z - deviation
        size = half * x * x
        t = one / (one + np.abs(x) * np.float32(0.5 / math.sqrt(2.0)))
        series = _ERFC_9
        series = _ERFC_8 + t * series
        series = _ERFC_7 + t * series
        series = _ERFC_6 + t * series
        series = _ERFC_5 + t * series
        series = _ERFC_4 + t * series
        series = _ERFC_3 + t * series
        series = _ERFC_2 + t * series
        series = _ERFC_1 + t * series
        series = _ERFC_0 + t * series
        tail = half * t * _exp(series)  # Phi(-|x|) exp(x^2 / 2)
        density = _exp(-size)
        part = one - min(tail * density, half)
        upper = x > 0
        ratio = density / part if upper else one / tail
        weights[c] = sizes[0, c] * (part if upper else tail)
        tilts[c] = sizes[1, c] * (one - ratio * _PER_ROOT_2_PI / deviation)
        scores[c] += half * own if upper else z * deviation - half * z * z


@_njit
def _exp(x):
    """exp of a float32 not above 88: Cephes' polynomial; 0 where it is below the least normal."""
    kept = max(x, np.float32(-87.3))
    power = np.floor(kept * np.float32(1.44269504) + np.float32(0.5))
    r = kept - power * np.float32(0.693359375) + power * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    found = (p * r * r + r + np.float32(1.0)) * np.int32(
        (np.int32(power) + np.int32(127)) << np.int32(23)
    ).view(np.float32)
    return found if x >= np.float32(-87.3) else np.float32(0.0)


@_njit
def _average(weights, values, means, tilt, both, value):
    """The mean value of the rest."""
    clusters, dim = values.shape
    for j in range(dim):
        value[j] = means[dim + j] + np.float32(tilt) * both[dim + j]
    for c in range(clusters):
        weight = weights[c]
        if weight != 0:  # also where it is NaN
            row = values[c]
            for j in range(dim):
                value[j] += weight * _widened(row[j])


@_njit
def _add(job, query, log_rest, tilt, value):
    """The rest of one query head, added to its output."""
    dim = job.dim
    out = carray(float32_pointer(job.out + 4 * query * dim), dim)
    lse = carray(float32_pointer(job.lse + 4 * query), 1)
    check = log_rest + tilt
    for j in range(dim):
        check += value[j]
    if not abs(check) < np.inf:
        return
    top = max(np.float64(lse[0]), log_rest)
    before, added = math.exp(lse[0] - top), math.exp(log_rest - top)
    total = before + added
    for j in range(dim):
        kept = before * out[j] if before > 0 else 0.0
        out[j] = (kept + added * value[j]) / total
    lse[0] = top + math.log(total)


@_njit
def _quantile(above):
    small = max(min(above, 1 - above), 1e-30)
    s = math.sqrt(-2 * math.log(small))
    z = s - (_A0 + s * (_A1 + s * _A2)) / (1 + s * (_B0 + s * (_B1 + s * _B2)))
    return -z if above > 0.5 else z


@functools.cache
def _function() -> Callable:
    stamp = stamp_of(Path(__file__).parent)
    return compiled("estimate of the rest", _SIGNATURE, [_entry(stamp)])[0]
