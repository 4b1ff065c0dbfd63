"""Decode attention on a CPU: stream-K over tiles of rows, vector code generated through Numba.

LeanAttention (arXiv 2405.10480) on cores in place of SMs: every worker gets equally many tiles
of the selected rows, wherever lists of ranges begin and end. Shares are fixed before any thread
starts and partial results are merged in their order, so equal inputs give bit-equal outputs at
one number of threads, whichever thread takes which share.
"""

import ctypes
import functools
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from saap.kernels.cpu.functions import compiled, run, stamp_of

from . import numba_kernel as kernel

DIM_STEP = 16

_KINDS = {torch.float32: np.float32, torch.bfloat16: np.uint16, torch.float16: np.int16}


def limit(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """What of validated inputs this backend cannot do, or None."""
    if q.device.type != "cpu":
        return f"q must be on the CPU for impl 'numba'; got {q.device}"
    for name, tensor in (("q", q), ("k", k)):
        if tensor.dtype not in _KINDS:
            return (
                f"{name} must have dtype float32, bfloat16 or float16 for impl 'numba'; got "
                f"{tensor.dtype}"
            )
    if q.shape[-1] % DIM_STEP or q.shape[-1] == 0:
        return f"head_dim must be a multiple of {DIM_STEP} for impl 'numba'; got {q.shape[-1]}"
    for name, tensor in (("k", k), ("v", v)):
        if tensor.stride(-1) != 1:
            return f"{name} must have stride 1 over D for impl 'numba'; got {tensor.stride(-1)}"
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

    # Addresses are passed on, and memory does not say that a sign is still to be changed.
    q, k, v = (t.detach().resolve_neg() for t in (q, k, v))
    queries = q.to(torch.float32).contiguous()
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
    run(work, address, job.workers)
    for b, head in np.argwhere(np.isnan(lse.numpy())).tolist():
        places = starts[b, head * list_heads // q_heads], lengths[b, head * list_heads // q_heads]
        keys = k[b, head * k.shape[1] // q_heads]
        lse[b, head] = _lse_of_one(queries[b, head], keys, *places, sm_scale, softcap)
    return out.to(q.dtype), lse


def _lse_of_one(q, k, starts, lengths, sm_scale, softcap) -> Tensor:
    """Log-sum-exp of one head whose scores are not all finite, as torch has it: of +inf it is inf.

    The kernel's sum is NaN then, whether a score was +inf or NaN.
    """
    ranges = zip(starts.tolist(), lengths.tolist(), strict=True)
    keys = torch.cat([k[first : first + n].float() for first, n in ranges if n])
    scores = keys @ q * sm_scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.logsumexp(0)


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
    entries = kernel.entries(_KINDS[dtype](0), stamp_of(Path(__file__).parent))
    plan, work = compiled(f"attention for {dtype} storage", kernel.SIGNATURE, entries)
    return plan, work
