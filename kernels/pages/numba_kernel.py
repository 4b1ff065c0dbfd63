"""Writing codes, weighing pages and choosing among them: what runs on each thread."""

import math

import numba
import numpy as np
from numba import carray

from saap.kernels.codes.numba_best import best
from saap.kernels.codes.numba_simd import BLOCK
from saap.kernels.cpu.ahead import fetch_ahead
from saap.kernels.cpu.emitter import LANES
from saap.kernels.cpu.jobs import job_type, offset_of
from saap.kernels.cpu.memory import (
    fetch_increment,
    float32_pointer,
    int8_pointer,
    int32_pointer,
    int64_pointer,
)

from .layout import LARGEST, PER_WORD, QUERY_MAX, STEP, ZERO
from .numba_simd import WIDEST, weigh_page

FIELDS = (
    "words scales rows dim kv_heads pages "  # of the codes
    "keys slots tokens "  # of what is coded
    "q group tasks table table_row most lens keep sink_pages window_pages out out_row "
    "weights offsets factors maxima totals workspace worker_bytes "
    "chunk chunks fault next_worker next_task"
).split()
NEXT_WORKER = offset_of(FIELDS, "next_worker")
NEXT_TASK = offset_of(FIELDS, "next_task")
FAULT = offset_of(FIELDS, "fault")

Job, SIGNATURE = job_type(FIELDS, ("unused",))

TOKENS_AT_ONCE = 16
AHEAD = 2
"""How many pages before its turn a page is asked for."""

CHUNK = 512
"""Numbers that `best` handles at a time."""

_njit = numba.njit(error_model="numpy")


def worker_bytes(most: int, rows: int) -> int:
    """Bytes that a worker needs: scores of a page, or weights and places of all pages."""
    room = -(-most // CHUNK) * CHUNK
    return 4 * max(WIDEST * rows, 2 * (room + CHUNK) + LANES)


def encode_entry(stamp):
    """C function to compile; `stamp` becomes a part of the cache's key."""

    def encode(jobs):
        _ = stamp
        _encode_tokens(carray(jobs, 1))

    return encode


def weigh_entry(stamp):
    def weigh(jobs):
        _ = stamp
        _weigh_chunks(carray(jobs, 1))

    return weigh


def choose_entry(stamp):
    def choose(jobs):
        _ = stamp
        _choose_pages(carray(jobs, 1))

    return choose


def prepare_entry(stamp):
    def prepare(jobs):
        _ = stamp
        job = carray(jobs, 1)[0]
        for head in range(job.tasks * job.group):
            _prepare(job, head)

    return prepare


@_njit
def _encode_tokens(jobs):
    job = jobs[0]
    while True:
        first = fetch_increment(jobs.ctypes.data + NEXT_TASK) * TOKENS_AT_ONCE
        if first >= job.tokens:
            break
        slots = carray(int64_pointer(job.slots), job.tokens)
        for token in range(first, min(first + TOKENS_AT_ONCE, job.tokens)):
            if slots[token] >= 0:
                for head in range(job.kv_heads):
                    _encode(job, token, head, slots[token] // job.rows, slots[token] % job.rows)


@_njit
def _encode(job, token, head, page, row):
    x = carray(float32_pointer(job.keys + 4 * (token * job.kv_heads + head) * job.dim), job.dim)
    place = page * job.kv_heads + head
    words = carray(int32_pointer(job.words + 4 * place * job.dim // PER_WORD * job.rows),
                   (job.dim // PER_WORD, job.rows))  # fmt: skip
    scales = carray(float32_pointer(job.scales + 4 * place * job.rows), job.rows)
    own = 0.0
    for d in range(job.dim):
        value = x[d] if abs(x[d]) < np.inf else np.float32(0.0)
        own += np.float64(value) * value
    length = math.sqrt(own / job.dim)
    inverse = 1.0 / (STEP * length) if length > 0 else 0.0
    match = 0.0
    for w in range(job.dim // PER_WORD):
        word = np.int64(0)
        for j in range(PER_WORD):
            value = np.float64(x[w * PER_WORD + j])
            value = value if abs(value) < np.inf else 0.0
            code = min(max(np.rint(value * inverse + ZERO), 0.0), 1.0 * LARGEST)
            match += (code - ZERO) * value
            word |= np.int64(code) << (8 * (j % 4) + 4 * (j // 4))
        words[w, row] = np.int32(word)
    scales[row] = own / match if match > 0 else 0.0


@_njit
def _prepare(job, head):
    q = carray(float32_pointer(job.q + 4 * head * job.dim), job.dim)
    weights = carray(int8_pointer(job.weights + head * job.dim), job.dim)
    largest = np.float32(0.0)
    for d in range(job.dim):
        size = abs(q[d])
        largest = size if size > largest or np.isnan(size) else largest
    usable = largest > 0 and largest < np.inf
    factor = largest / np.float32(QUERY_MAX) if usable else np.float32(1.0)
    total = np.float32(0.0)
    for d in range(job.dim):
        weight = np.rint(q[d] / factor) if usable else np.float32(0.0)
        weights[d] = np.int8(weight)
        total += weight
    carray(float32_pointer(job.offsets + 4 * head), 1)[0] = total * np.float32(ZERO)
    carray(float32_pointer(job.factors + 4 * head), 1)[0] = factor


@_njit
def _extent(job, task):
    """Tokens and pages of a task's request, and how many of the pages are to be visited."""
    request = task // job.kv_heads
    n = np.int64(carray(int32_pointer(job.lens), request + 1)[request])
    pages = (n + job.rows - 1) // job.rows
    keep = np.int64(carray(int32_pointer(job.keep), request + 1)[request])
    return n, pages, min(keep, pages)


@_njit
def _blocks(job, task):
    return carray(int32_pointer(job.table + 4 * (task // job.kv_heads) * job.table_row), job.most)


@_njit
def _weigh_chunks(jobs):
    job = jobs[0]
    counters = jobs.ctypes.data
    worker = fetch_increment(counters + NEXT_WORKER)
    space = job.workspace + job.worker_bytes * worker
    while True:
        unit = fetch_increment(counters + NEXT_TASK)
        if unit >= job.tasks * job.chunks:
            break
        task = unit // job.chunks
        n, pages, keep = _extent(job, task)
        first = unit % job.chunks * job.chunk
        if keep < pages and first < pages:
            blocks = _blocks(job, task)
            for page in range(first, min(first + job.chunk, pages)):
                block = np.int64(blocks[page])
                if block < 0 or block >= job.pages:
                    carray(int64_pointer(counters + FAULT), 1)[0] = 1
                else:
                    ahead = np.int64(blocks[min(page + AHEAD, pages - 1)])
                    place = ahead * job.kv_heads + task % job.kv_heads
                    page_bytes = job.dim // PER_WORD * 4 * job.rows
                    fetch_ahead(job.words + place * page_bytes, page_bytes)
                    fetch_ahead(job.scales + 4 * place * job.rows, 4 * job.rows)
                    _weigh(job, task, page, block, min(job.rows, n - page * job.rows), space)


@_njit
def _weigh(job, task, page, block, count, space):
    place = block * job.kv_heads + task % job.kv_heads
    words = job.words + 4 * place * (job.dim // PER_WORD) * job.rows
    for g in range(0, job.group, WIDEST):
        head = task * job.group + g
        at = 4 * (head * job.most + page)
        weigh_page(min(WIDEST, job.group - g), words, job.dim // PER_WORD, job.rows // LANES,
                   job.scales + 4 * place * job.rows, count, job.weights + head * job.dim,
                   job.offsets + 4 * head, job.factors + 4 * head, space,
                   job.maxima + at, job.totals + at, 4 * job.most)  # fmt: skip


@_njit
def _choose_pages(jobs):
    job = jobs[0]
    counters = jobs.ctypes.data
    worker = fetch_increment(counters + NEXT_WORKER)
    space = job.workspace + job.worker_bytes * worker
    while True:
        task = fetch_increment(counters + NEXT_TASK)
        if task >= job.tasks:
            break
        _choose(job, task, space, counters + FAULT)


@_njit
def _choose(job, task, space, fault):
    """Write the pages of a task: those at both ends and the heaviest between."""
    _, pages, keep = _extent(job, task)
    blocks = _blocks(job, task)
    out = carray(int32_pointer(job.out + 4 * task * job.out_row), keep)
    first, last = (job.sink_pages, pages - job.window_pages) if keep < pages else (pages, pages)
    found = 0
    for page in range(first):
        found = _write(job, task, blocks[page], out, found, fault)
    between = keep - found - (pages - last)
    if between > 0:
        keys = space
        places = space + 4 * ((last - first + BLOCK) // BLOCK + 1) * BLOCK
        _weights(job, task, pages, first, last, carray(float32_pointer(keys), job.most + CHUNK))
        best(keys, last - first, between, places, 0)
        chosen = carray(int32_pointer(places), between)
        for i in range(between):
            found = _write(job, task, blocks[first + chosen[i]], out, found, fault)
    for page in range(last, pages):
        found = _write(job, task, blocks[page], out, found, fault)


@_njit
def _write(job, task, block, out, found, fault):
    if block < 0 or block >= job.pages:
        carray(int64_pointer(fault), 1)[0] = 1
    out[found] = block * job.kv_heads + task % job.kv_heads
    return found + 1


@_njit
def _weights(job, task, pages, first, last, weights):
    """Each page's share of the softmax of all pages, added over the heads; zeros behind them."""
    for i in range((last - first + BLOCK) // BLOCK * BLOCK):
        weights[i] = 0.0
    for g in range(job.group):
        place = 4 * (task * job.group + g) * job.most
        maxima = carray(float32_pointer(job.maxima + place), job.most)
        totals = carray(float32_pointer(job.totals + place), job.most)
        largest = maxima[0]
        for page in range(pages):
            largest = max(largest, maxima[page])
        whole = 0.0
        for page in range(pages):
            totals[page] *= math.exp(maxima[page] - largest)
            whole += totals[page]
        factor = np.float32(1.0 / whole)
        for page in range(first, last):
            weights[page - first] += totals[page] * factor
