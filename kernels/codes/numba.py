"""Choice of rows by coded keys on a CPU: a scan of all codes, then the choice."""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from saap.kernels.cpu.functions import compiled, run, stamp_of
from saap.kernels.cpu.scratch import scratch

from . import numba_choice, numba_job, numba_scan
from .layout import Codes


def limit(q: Tensor, codes: Codes, out: tuple[Tensor, Tensor]) -> str | None:
    """What of validated arguments this backend cannot do, or None."""
    if any(t.device.type != "cpu" for t in (q, *out)):
        return f"impl 'numba' needs the CPU; got q on {q.device}"
    for name, tensor in zip(("starts", "lengths"), out, strict=True):
        if tensor.stride(2) != 1 or tensor.stride() != out[0].stride():
            return (
                f"out must be strided alike, its last dimension contiguous; got {name} otherwise"
            )
    return codes.misplaced(q.device)


def _places_of(codes: Codes) -> dict[str, int]:
    """A job's fields that say where codes lie, kept with them."""
    held = codes.__dict__.get("_places")
    if held is None:
        coarse, fine, scale = codes.coarse, codes.fine, codes.scale
        held = codes.__dict__["_places"] = {
            "coarse": coarse.data_ptr(), "fine": fine.data_ptr(), "scale": scale.data_ptr(),
            "kv_heads": scale.shape[1], "coordinates": codes.coordinates,
            "coarse_batch": 4 * coarse.stride(0), "coarse_head": 4 * coarse.stride(1),
            "coarse_plane": 4 * coarse.stride(2), "fine_batch": 4 * fine.stride(0),
            "fine_head": 4 * fine.stride(1), "scale_batch": scale.stride(0),
            "scale_head": scale.stride(1),
        }  # fmt: skip
    return held


def select_rows(
    a: Tensor, codes: Codes, n_rows: list[int], *, max_tokens: int, n_candidates: int,
    first_row: int, out: tuple[Tensor, Tensor], scored: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`a [n, H, G, P]`: scaled queries of the G heads that share each of the H selections."""
    n, heads, group, coordinates = a.shape
    a = a.resolve_neg().contiguous()
    most = max(n_rows)
    tasks = n * heads
    chunks = -(-most // numba_job.CHUNK)
    whole = n_candidates >= most
    threads = min(torch.get_num_threads(), tasks * chunks)
    # With a task to each thread at a time, its scores stay in the cache.
    by_task = tasks % threads == 0 or tasks >= 8 * threads
    threads = min(threads, tasks) if by_task else threads
    held = threads if by_task else tasks
    found = min(most, group * n_candidates)
    worker_bytes = numba_job.choice_bytes(most, found, group, coordinates)
    sizes = {
        "rows": 8 * len(n_rows),
        "counts": 16 * tasks,
        "workspace": threads * worker_bytes,
        "weights": 2 * tasks * group * coordinates,
        "factors": 16 * tasks * group,
        "scores": 4 * held * group * chunks * numba_job.CHUNK,
        "maxima": 4 * held * group * chunks,
        "totals": 4 * held * group * chunks,
    }
    _held, place = scratch(sizes)  # to the end of this call
    _integers(len(n_rows)).from_address(place["rows"])[:] = n_rows
    starts, lengths = out
    fields = {
        "q": a.data_ptr(), "starts": starts.data_ptr(), "lengths": lengths.data_ptr(),
        "tasks": tasks, "heads": heads, "group": group, "chunks": chunks,
        "by_sequence": len(n_rows) > 1, "by_task": by_task, "whole": whole,
        "out_batch": 4 * starts.stride(0), "out_head": 4 * starts.stride(1),
        "capacity": starts.shape[2], "first_row": first_row, "max_tokens": max_tokens,
        "candidates": n_candidates, "worker_bytes": worker_bytes,
        **place, **_places_of(codes),
    }  # fmt: skip
    prepare, scan, choose = _functions()
    job = numba_job.Job(**fields)
    address = ctypes.addressof(job)
    prepare(address)
    if not by_task and max_tokens < most:  # else every row is chosen
        run(scan, address, threads)
        job.next_worker = job.next_task = 0
    run(choose, address, min(threads, tasks))
    counts = _integers(2 * tasks).from_address(place["counts"])[:]
    scored.copy_(torch.tensor(counts[tasks:]).view_as(scored))
    used = max(counts[:tasks])
    return starts[..., :used], lengths[..., :used]


@functools.cache
def _integers(count: int) -> type:
    return ctypes.c_int64 * count


@functools.cache
def _functions() -> list[Callable]:
    stamp = stamp_of(Path(__file__).parent)
    entries = [numba_scan.prepare_entry(stamp), numba_scan.entry(stamp), numba_choice.entry(stamp)]
    return compiled("choice of coded rows", numba_job.SIGNATURE, entries)
