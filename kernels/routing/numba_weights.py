"""Predicted attention weight of one key of each cell, one query group at a time."""

import math

import numba
import numpy as np
from numba import carray

from saap.kernels.cpu.emitter import LANES
from saap.kernels.cpu.jobs import job_type, offset_of
from saap.kernels.cpu.memory import (
    fetch_increment,
    float32_pointer,
    float64_pointer,
    int32_pointer,
)

from .numba_simd import ROWS, WIDEST, blend, combine, exponentials, matvec, products

NETWORK = "mean scale w1 b1 w2 b2 w2_scale".split()
"""Addresses of the network, 0 without one; w2 is int8 if it has scales, else all are float32."""

_FIELDS = (
    NETWORK
    + (
        "q keys inv_freq sizes n_middle distance out "  # addresses; n_middle, distance float64
        "batch heads group dim pairs nlist segments hidden "
        "interleaved per_head by_size "  # flags
        "sizes_batch "  # bytes from one sequence's sizes to the next's
        "workspace next_worker next_task"
    ).split()
)
_SCALARS = ("trained_share",)
_NEXT_WORKER = offset_of(_FIELDS, "next_worker")
_NEXT_TASK = offset_of(_FIELDS, "next_task")

Job, SIGNATURE = job_type(_FIELDS, _SCALARS)

_njit = numba.njit(error_model="numpy")


@_njit
def _filled_up(n):
    return -(-n // LANES) * LANES


@_njit
def workspace_floats(group, dim, nlist, segments, hidden):
    """Float32 of memory that a worker needs."""
    width = _filled_up(segments)
    buckets = _filled_up(nlist + 1)
    return (
        (dim + nlist) * group * width  # turned queries, scores
        + nlist * width * 2  # sizes, combined weights
        + _filled_up(dim)
        + _filled_up(hidden)
        + buckets * 3  # logits, their share in the blend, keys of each bucket
        + _filled_up(group)
    )


def entry(stamp):
    """C function to compile; `stamp` becomes a part of the cache's key."""

    def weigh_entry(jobs):
        _ = stamp
        _work(carray(jobs, 1))

    return weigh_entry


@_njit
def _work(jobs):
    job = jobs[0]
    counters = jobs.ctypes.data
    worker = fetch_increment(counters + _NEXT_WORKER)
    width = _filled_up(job.segments)
    buckets = _filled_up(job.nlist + 1)
    size = workspace_floats(job.group, job.dim, job.nlist, job.segments, job.hidden)
    space = job.workspace + 4 * worker * size
    while True:
        task = fetch_increment(counters + _NEXT_TASK)
        if task >= job.batch * job.heads:
            break
        _weigh(job, task // job.heads, task % job.heads, space, width, buckets)


@_njit
def _weigh(job, b, head, space, width, buckets):
    """Weights of the cells of one KV head for the query group of one sequence."""
    columns = job.group * width
    turned = space
    scores = turned + 4 * job.dim * columns
    sizes = scores + 4 * job.nlist * columns
    combined = sizes + 4 * job.nlist * width
    standard = combined + 4 * job.nlist * width
    hidden = standard + 4 * _filled_up(job.dim)
    logits = hidden + 4 * _filled_up(job.hidden)
    base = logits + 4 * buckets
    in_bucket = base + 4 * buckets
    factors = in_bucket + 4 * buckets
    vectors = width // LANES
    _sizes_as_floats(job, b, head, width, buckets, sizes, in_bucket)
    _turn(job, b, head, width, turned)
    _score(job, head, columns, turned, scores)
    factor = carray(float32_pointer(factors), job.group)
    keep = np.float32(1.0 - job.trained_share) if job.w1 else np.float32(1.0)
    for g in range(job.group):
        middle = np.float32(1.0)
        if job.w1:
            middle = _network(job, b, head * job.group + g, standard, hidden, logits, base,
                              in_bucket, buckets)  # fmt: skip
        elif g == 0:
            _fill(base, job.nlist)
        own = scores + 4 * g * width
        best = blend(own, 4 * columns, sizes, job.nlist, vectors, base, keep)
        if best == -np.inf:  # no keys
            best = np.float32(0.0)
        total = exponentials(own, 4 * columns, sizes, job.nlist, vectors, best)
        factor[g] = middle / total if total != 0 else np.float32(0.0)
    rows = job.group if job.per_head else 1
    summed = 1 if job.per_head else job.group
    n_lists = job.nlist * job.segments
    for row in range(rows):
        out = job.out + 4 * ((b * job.heads + head) * rows + row) * n_lists
        target = out if width == job.segments else combined
        combine(scores + 4 * row * width, 4 * columns, summed, factors + 4 * row, sizes,
                job.by_size, job.nlist, vectors, target)  # fmt: skip
        if target != out:
            _without_filling(job, combined, width, out)


@_njit
def _fill(address, n):
    values = carray(float32_pointer(address), n)
    for i in range(n):
        values[i] = 0


@_njit
def _sizes_as_floats(job, b, head, width, buckets, sizes, in_bucket):
    n_lists = job.nlist * job.segments
    given = carray(int32_pointer(job.sizes + b * job.sizes_batch + 4 * head * n_lists), n_lists)
    own = carray(float32_pointer(sizes), job.nlist * width)
    sums = carray(float32_pointer(in_bucket), buckets)
    if width == job.segments:
        for i in range(n_lists):
            own[i] = given[i]
    else:
        for bucket in range(job.nlist):
            for s in range(width):
                own[bucket * width + s] = (
                    given[bucket * job.segments + s] if s < job.segments else 0
                )
    for bucket in range(job.nlist):
        total = 0
        for s in range(job.segments):
            total += given[bucket * job.segments + s]
        sums[bucket] = total
    for bucket in range(job.nlist, buckets):
        sums[bucket] = 0


@_njit
def _turn(job, b, head, width, turned):
    """The group's queries, `[dim, group, width]`, turned to the mean age of each segment.

    Segments are equally long, so that each angle is the one before it turned by one step.
    """
    columns = job.group * width
    out = carray(float32_pointer(turned), job.dim * columns)
    first_head = (b * job.heads + head) * job.group
    q = carray(float32_pointer(job.q + 4 * first_head * job.dim), job.group * job.dim)
    inv_freq = carray(float32_pointer(job.inv_freq), job.pairs)
    n = max(1.0, carray(float64_pointer(job.n_middle), job.batch)[b])
    distance = carray(float64_pointer(job.distance), job.batch)[b]
    step = n / job.segments
    oldest = distance + 0.5 - 0.5 * step
    keys_of_segment = max(1.0, step)
    for i in range(2 * job.pairs * columns, job.dim * columns):
        out[i] = 0
    for p in range(job.pairs):
        frequency = np.float64(inv_freq[p])
        half = 0.5 * frequency
        damping = 1.0
        if math.sin(half) != 0.0:
            damping = math.sin(keys_of_segment * half) / (keys_of_segment * math.sin(half))
        c, s = damping * math.cos(oldest * frequency), damping * math.sin(oldest * frequency)
        step_c, step_s = math.cos(step * frequency), math.sin(step * frequency)
        first = 2 * p if job.interleaved else p
        second = 2 * p + 1 if job.interleaved else p + job.pairs
        for t in range(width):
            inside = t < job.segments
            for g in range(job.group):
                x, y = q[g * job.dim + first], q[g * job.dim + second]
                place = g * width + t
                out[first * columns + place] = x * c - y * s if inside else 0.0
                out[second * columns + place] = y * c + x * s if inside else 0.0
            c, s = c * step_c + s * step_s, s * step_c - c * step_s
    for d in range(2 * job.pairs, job.dim):
        for g in range(job.group):
            for t in range(job.segments):
                out[d * columns + g * width + t] = q[g * job.dim + d]


@_njit
def _score(job, head, columns, turned, scores):
    """Products of all centroids of a head with the turned queries, `[nlist, group, width]`."""
    keys = job.keys + 4 * head * job.nlist * job.dim
    vectors, row, key_bytes = columns // LANES, 4 * columns, 4 * job.dim
    bucket = 0
    while bucket < job.nlist:
        rows = ROWS if job.nlist - bucket >= ROWS else 1
        done = 0
        while done < vectors:
            part = WIDEST
            while part > vectors - done:
                part //= 2
            place = 4 * LANES * done
            products(rows, part, keys + bucket * key_bytes, key_bytes, turned + place, row,
                     job.dim, scores + bucket * row + place)  # fmt: skip
            done += part
        bucket += rows


@_njit
def _network(job, b, head, standard, hidden, logits, base, in_bucket, buckets):
    """The classifier's share of the blend, to `base`; returns the mass of the middle."""
    q = carray(float32_pointer(job.q + 4 * (b * job.heads * job.group + head) * job.dim), job.dim)
    mean = carray(float32_pointer(job.mean + 4 * head * job.dim), job.dim)
    scale = carray(float32_pointer(job.scale + 4 * head * job.dim), job.dim)
    x = carray(float32_pointer(standard), job.dim)
    for d in range(job.dim):
        x[d] = (q[d] - mean[d]) * scale[d]
    matvec(np.float32(0), job.w1 + 4 * head * job.hidden * job.dim, 0,
           job.b1 + 4 * head * job.hidden, standard, job.hidden, job.dim, hidden)  # fmt: skip
    h = carray(float32_pointer(hidden), job.hidden)
    for i in range(job.hidden):
        h[i] /= np.float32(1.0) + np.float32(math.exp(-h[i]))
    rows = job.nlist + 1
    bias = job.b2 + 4 * head * rows
    if job.w2_scale:
        matvec(np.int8(0), job.w2 + head * rows * job.hidden, job.w2_scale + 4 * head * rows, bias,
               hidden, rows, job.hidden, logits)  # fmt: skip
    else:
        matvec(np.float32(0), job.w2 + 4 * head * rows * job.hidden, 0, bias,
               hidden, rows, job.hidden, logits)  # fmt: skip
    values = carray(float32_pointer(logits), buckets)
    own = carray(float32_pointer(base), buckets)
    outside = values[job.nlist]
    best = outside
    for bucket in range(job.nlist):
        own[bucket] = np.float32(job.trained_share) * values[bucket]
        best = max(best, values[bucket])
    for bucket in range(job.nlist, buckets):
        values[bucket] = best
    inside = exponentials(logits, 4 * LANES, in_bucket, buckets // LANES, 1, best)
    return inside / (inside + np.float32(math.exp(outside - best)))


@_njit
def _without_filling(job, filled, width, out):
    given = carray(float32_pointer(filled), job.nlist * width)
    target = carray(float32_pointer(out), job.nlist * job.segments)
    for bucket in range(job.nlist):
        for s in range(job.segments):
            target[bucket * job.segments + s] = given[bucket * width + s]
