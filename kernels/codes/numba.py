"""Choice of rows by coded keys on a CPU: one scan of all coarse codes, then the candidates."""

import ctypes
import functools
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from saap.kernels.cpu.functions import compiled, run, stamp_of

from . import numba_choice, numba_scan
from .layout import Codes, scale_table


def limit(q: Tensor, codes: Codes, out: tuple[Tensor, Tensor]) -> str | None:
    """What of validated arguments this backend cannot do, or None."""
    tensors = (q, codes.coarse, codes.fine, codes.scale, *out)
    if any(t.device.type != "cpu" for t in tensors):
        return f"impl 'numba' needs the CPU; got q on {q.device}"
    for name, tensor in zip(("starts", "lengths"), out, strict=True):
        if tensor.stride(2) != 1 or tensor.stride() != out[0].stride():
            return (
                f"out must be strided alike, its last dimension contiguous; got {name} otherwise"
            )
    for name in ("coarse", "fine", "scale"):
        tensor = getattr(codes, name)
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            return f"codes.{name} must be contiguous in its last dimension; got strides"
    if codes.fine.stride(2) != codes.fine.shape[3]:
        return "the fine words of a key must follow those of the one before; got strides"
    return None


def select_rows(
    a: Tensor, codes: Codes, n_rows: list[int], *, max_tokens: int, n_candidates: int,
    first_row: int, out: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`a [n, H, G, P]`: scaled queries of the G heads that share each of the H selections."""
    n, heads, group, coordinates = a.shape
    a = a.resolve_neg().contiguous()
    most = max(n_rows)
    tasks = n * heads
    chunks = -(-most // numba_scan.CHUNK)
    candidates = min(n_candidates, most)
    rows = torch.tensor(n_rows, dtype=torch.int64)
    counts = torch.zeros(tasks, dtype=torch.int64)
    scores = torch.empty(tasks, group, most)
    maxima, totals = torch.empty(2, tasks, group, chunks)
    table = _table()
    threads = min(torch.get_num_threads(), tasks * chunks)
    scan_space = torch.empty(threads * numba_scan.workspace_floats(group))
    choice_threads = min(torch.get_num_threads(), tasks)
    choice_space = torch.empty(
        choice_threads * numba_choice.workspace_bytes(most, candidates, group, coordinates),
        dtype=torch.uint8,
    )
    starts, lengths = out
    shared = (
        a.data_ptr(), codes.coarse.data_ptr(), codes.fine.data_ptr(), codes.scale.data_ptr(),
        table.data_ptr(), rows.data_ptr(), scores.data_ptr(), maxima.data_ptr(),
        totals.data_ptr(),
        starts.data_ptr(), lengths.data_ptr(), counts.data_ptr(),
        tasks, heads, codes.scale.shape[1], group, coordinates, most, chunks,
        0 if len(n_rows) == 1 else 1,
        4 * codes.coarse.stride(0), 4 * codes.coarse.stride(1), 4 * codes.coarse.stride(2),
        4 * codes.fine.stride(0), 4 * codes.fine.stride(1),
        codes.scale.stride(0), codes.scale.stride(1),
        4 * starts.stride(0), 4 * starts.stride(1), starts.shape[2],
        first_row, max_tokens, candidates,
    )  # fmt: skip
    job = numba_scan.Job(*shared, scan_space.data_ptr(), 0, 0, 0.0)
    if candidates < most and max_tokens < most:  # else every row is a candidate
        run(_scan(), ctypes.addressof(job), threads)
    job = numba_scan.Job(*shared, choice_space.data_ptr(), 0, 0, -math.inf)
    run(_choose(), ctypes.addressof(job), choice_threads)
    used = int(counts.max())
    return starts[..., :used], lengths[..., :used]


@functools.cache
def _table() -> Tensor:
    return scale_table().contiguous()


@functools.cache
def _scan() -> Callable:
    entry = numba_scan.entry(stamp_of(Path(__file__).parent))
    return compiled("scan of coarse codes", numba_scan.SIGNATURE, [entry])[0]


@functools.cache
def _choose() -> Callable:
    entry = numba_choice.entry(stamp_of(Path(__file__).parent))
    return compiled("choice of coded rows", numba_scan.SIGNATURE, [entry])[0]
