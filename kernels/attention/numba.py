"""Decode attention on a CPU: stream-K over tiles of rows, vector code generated through Numba.

LeanAttention (arXiv 2405.10480) on cores in place of SMs: every worker gets equally many tiles
of the selected rows, wherever lists of ranges begin and end. Shares are fixed before any thread
starts and partial results are merged in their order, so equal inputs give bit-equal outputs at
one number of threads, whichever thread takes which share.

Workers run on the OpenMP threads that torch already owns: a second pool would compete with them.
"""

import ctypes
import functools
import logging
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import numpy as np
import torch
from torch import Tensor

from . import numba_kernel as kernel

log = logging.getLogger(__name__)

DIM_STEP = 16

_KINDS = {torch.float32: np.float32, torch.bfloat16: np.uint16, torch.float16: np.int16}
_C_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_compiled = []  # keeps the machine code alive


def limit(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """What of validated inputs this backend cannot do, or None."""
    if q.device.type != "cpu":
        return f"q is on {q.device}: impl 'numba' needs the CPU"
    for name, tensor in (("q", q), ("k", k)):
        if tensor.dtype not in _KINDS:
            return f"{name} has dtype {tensor.dtype}: impl 'numba' does float32, bfloat16, float16"
    if q.shape[-1] % DIM_STEP or q.shape[-1] == 0:
        return f"q has head_dim {q.shape[-1]}: impl 'numba' does multiples of {DIM_STEP}"
    for name, tensor in (("k", k), ("v", v)):
        if tensor.stride(-1) != 1:
            return f"{name} has stride {tensor.stride(-1)} over D: impl 'numba' needs 1"
    return None


def attend_ranges(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    lengths: Tensor,
    *,
    sm_scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """As `api.attend_ranges`, whose validation, `limit` included, is taken for granted.

    Computes in float32. K and V are read in place through their strides and may be stored in
    another dtype than q.
    """
    batch, q_heads, dim = q.shape
    list_heads, ranges = starts.shape[1:]
    lists, group = batch * list_heads, q_heads // list_heads
    threads = torch.get_num_threads()

    queries = q.detach().to(torch.float32).contiguous()
    starts, lengths = starts.contiguous(), lengths.contiguous()
    out, lse = torch.empty_like(queries), queries.new_empty(batch, q_heads)
    table = torch.empty(2 * lists + 1 + 2 * threads * kernel.SHARES, dtype=torch.int64)
    tiles = table.data_ptr()
    tokens = tiles + 8 * (lists + 1)
    scratch_count, partials_count = kernel.float_counts(threads, group, dim)
    scratch = queries.new_empty(scratch_count + partials_count)
    k_batch, k_head, k_row, _ = k.stride()
    v_batch, v_head, v_row, _ = v.stride()
    size = k.element_size()
    job = kernel.Job(
        q=queries.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
        starts=starts.data_ptr(),
        lengths=lengths.data_ptr(),
        out=out.data_ptr(),
        lse=lse.data_ptr(),
        k_batch=k_batch * size,
        k_head=k_head * size,
        k_row=k_row * size,
        v_batch=v_batch * size,
        v_head=v_head * size,
        v_row=v_row * size,
        lists=lists,
        list_heads=list_heads,
        kv_heads=k.shape[1],
        group=group,
        ranges=ranges,
        dim=dim,
        row_bytes=dim * size,
        tiles=tiles,
        tokens=tokens,
        slots=tokens + 8 * lists,
        scratch=scratch.data_ptr(),
        partials=scratch.data_ptr() + 4 * scratch_count,
        threads=threads,
        sm_scale=sm_scale,
        softcap=softcap or 0.0,
    )
    plan, work = _functions(k.dtype)
    address = ctypes.addressof(job)
    plan(address)
    if job.workers == 1:
        work(address)
    else:
        _in_parallel()(work, address, job.workers)
    return out.to(q.dtype), lse


def warmup(*dtypes: torch.dtype) -> float:
    """Compiles the kernel for K and V of these dtypes, or loads it from Numba's disk cache.

    Returns:
        Seconds taken.
    """
    begin = time.perf_counter()
    for dtype in dtypes or _KINDS:
        _functions(dtype)
    return time.perf_counter() - begin


@functools.cache
def _functions(dtype: torch.dtype) -> tuple[Callable, Callable]:
    """`plan` and `work` for one storage dtype, taking the address of a `Job`."""
    begin = time.perf_counter()
    compiled = [
        numba.cfunc(kernel.SIGNATURE, cache=True)(entry)
        for entry in kernel.entries(_KINDS[dtype](0), _stamp())
    ]
    _compiled.extend(compiled)
    seconds = time.perf_counter() - begin
    if all(c.cache_hits for c in compiled):
        log.info("CPU attention for %s storage: loaded in %.1f s", dtype, seconds)
    else:  # Shown by default: a first call that takes seconds should say why.
        log.warning(
            "CPU attention for %s storage: compiled in %.1f s, now in the disk cache",
            dtype,
            seconds,
        )
    plan, work = (_C_FUNCTION(c.address) for c in compiled)
    return plan, work


def _stamp() -> int:
    """Changes with the kernel's source: Numba's cache sees only the file of the entry itself."""
    sources = sorted(Path(__file__).parent.glob("numba_*.py"))
    return zlib.crc32(b"".join(source.read_bytes() for source in sources))


@functools.cache
def _in_parallel() -> Callable[[Callable, int, int], None]:
    """`run(work, address, workers)`: on torch's OpenMP threads, or on Python's where it has none.

    GOMP_parallel is exported by the OpenMP runtimes of GNU, LLVM and Intel on Linux.
    """
    try:
        gomp_parallel = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (OSError, AttributeError):
        pool = ThreadPoolExecutor(thread_name_prefix="saap-attention")
        return lambda work, address, workers: list(pool.map(work, [address] * workers))
    gomp_parallel.argtypes = (_C_FUNCTION, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    gomp_parallel.restype = None
    return lambda work, address, workers: gomp_parallel(work, address, workers, 0)
