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
from saap.kernels.cpu.scratch import Layout

from . import numba_kernel as kernel
from .int8_rows import widened
from .numba_simd import DIM_STEP
from .validate import check_range_values

CHECKS_VALUES = True  # of ranges, in the kernel

_KINDS = {
    torch.float32: np.float32, torch.bfloat16: np.uint16, torch.float16: np.int16,
    torch.int8: np.int8,
}  # fmt: skip


def limit(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """What of validated inputs this backend cannot do, or None."""
    if q.device.type != "cpu":
        return f"q must be on the CPU for impl 'numba'; got {q.device}"
    for name, tensor, dtypes in (("q", q, " or float16"), ("k", k, ", float16 or int8")):
        if tensor.dtype not in _KINDS:
            return (
                f"{name} must have dtype float32, bfloat16{dtypes} for impl 'numba'; got "
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
    """As `api.attend_ranges`, whose validation, `limit` included, is taken for granted. But
    the values of ranges are not: the kernel looks at them itself.

    Computes in float32. K and V are read in place through their strides and may be stored in
    another dtype than q.
    """
    options = {"sm_scale": sm_scale, "softcap": softcap}
    return Prepared(q, k, v, starts.contiguous(), lengths.contiguous(), **options)(q)


class Prepared:
    """Attention over the same rows and ranges as often as it is called, whatever they hold then.

    q: of the shape that calls have. starts, lengths: contiguous.
    """

    def __init__(self, q, k, v, starts, lengths, *, sm_scale, softcap):
        batch, q_heads, dim = q.shape
        list_heads, ranges = starts.shape[1:]
        lists, group = batch * list_heads, q_heads // list_heads
        # Addresses are passed on, and memory does not say that a sign is still to be changed.
        self.k, self.v = k.detach().resolve_neg(), v.detach().resolve_neg()
        self.starts, self.lengths = starts, lengths
        self.sm_scale, self.softcap = sm_scale, softcap
        self.lse_shape = batch, q_heads
        threads = torch.get_num_threads()
        worker_count, partials_count = kernel.float_counts(threads, group, dim)
        self.layout = Layout(
            {
                "tiles": 8 * (lists + 1),
                "tokens": 8 * lists,
                "slots": 16 * threads * kernel.SHARES,
                "scratch": 4 * threads * worker_count,
                "partials": 4 * partials_count,
            }
        )
        size = k.element_size()
        k_batch, k_head, k_row, _ = self.k.stride()
        v_batch, v_head, v_row, _ = self.v.stride()
        self.job = kernel.Job(
            k=self.k.data_ptr(),
            v=self.v.data_ptr(),
            starts=starts.data_ptr(),
            lengths=lengths.data_ptr(),
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
            rows=k.shape[2],
            threads=threads,
            worker_bytes=4 * worker_count,
            sm_scale=sm_scale,
            softcap=softcap or 0.0,
        )
        self.functions = _functions(k.dtype)

    def __call__(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """ValueError where a range is not within the rows."""
        queries = q.detach().resolve_neg().to(torch.float32).contiguous()
        out, lse = torch.empty_like(queries), queries.new_empty(self.lse_shape)
        # A job of this call alone, since several threads may use one preparation.
        job, _held = self.layout.copy_of(self.job)  # held to the end of this call
        job.q, job.out, job.lse = queries.data_ptr(), out.data_ptr(), lse.data_ptr()
        plan, work = self.functions
        address = ctypes.addressof(job)
        plan(address)
        if job.wrong:
            check_range_values(self.starts, self.lengths, self.k.shape[2])
        run(work, address, job.workers)
        if job.not_finite:
            self._mend(queries, lse)
        return out if out.dtype == q.dtype else out.to(q.dtype), lse

    def _mend(self, queries: Tensor, lse: Tensor) -> None:
        """Log-sum-exps of heads whose scores are not all finite, as torch has them: of +inf, inf.

        The kernel's sum is NaN then, whether a score was +inf or NaN.
        """
        q_heads, kv_heads, list_heads = queries.shape[1], self.k.shape[1], self.starts.shape[1]
        for b, head in lse.isnan().nonzero().tolist():
            place = b, head * list_heads // q_heads
            keys = self.k[b, head * kv_heads // q_heads]
            options = self.starts[place], self.lengths[place], self.sm_scale, self.softcap
            lse[b, head] = _lse_of_one(queries[b, head], keys, *options)


def _lse_of_one(q, k, starts, lengths, sm_scale, softcap) -> Tensor:
    ranges = zip(starts.tolist(), lengths.tolist(), strict=True)
    keys = torch.cat([widened(k[first : first + n], torch.float32) for first, n in ranges if n])
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
