"""Choice of pages by coded keys on a CPU: all pages weighed, then the choice."""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from saap.kernels.codes import numba_best
from saap.kernels.cpu.functions import compiled, run, stamp_of
from saap.kernels.cpu.scratch import scratch

from . import numba_kernel as kernel
from .layout import PageCodes
from .numba_simd import BLOCK

CHUNK = 32
"""Pages of a unit of work."""


def limit(tensor: Tensor, codes: PageCodes) -> str | None:
    """What of validated arguments this backend cannot do, or None."""
    if tensor.device.type != "cpu" or codes.words.device.type != "cpu":
        return f"impl 'numba' needs the CPU; got tensors on {tensor.device}"
    if codes.rows % BLOCK:
        return f"impl 'numba' needs pages of a multiple of {BLOCK} rows; got {codes.rows}"
    return None


def _places_of(codes: PageCodes) -> dict[str, int]:
    """A job's fields that say where codes lie, kept with them until they lie elsewhere."""
    held, words = codes.__dict__.get("_places"), codes.words.data_ptr()
    if held is None or held["words"] != words:
        held = codes.__dict__["_places"] = {
            "words": words, "scales": codes.scales.data_ptr(),
            "rows": codes.rows, "dim": codes.dim, "kv_heads": codes.kv_heads,
            "pages": codes.pages,
        }  # fmt: skip
    return held


def encode_rows(keys: Tensor, slots: Tensor, codes: PageCodes) -> None:
    keys, slots = keys.contiguous(), slots.contiguous()
    job = kernel.Job(
        keys=keys.data_ptr(), slots=slots.data_ptr(), tokens=len(slots), **_places_of(codes)
    )
    units = -(-len(slots) // kernel.TOKENS_AT_ONCE)
    run(_functions()[0], ctypes.addressof(job), min(torch.get_num_threads(), units))


def select_pages(
    q: Tensor, codes: PageCodes, block_table: Tensor, seq_lens: Tensor, keep: Tensor,
    sink_pages: int, window_pages: int, out: Tensor,
) -> Tensor:  # fmt: skip
    q, seq_lens, keep = (t.contiguous() for t in (q.resolve_neg(), seq_lens, keep))
    tasks, most = len(q) * codes.kv_heads, block_table.shape[1]
    heads = len(q) * q.shape[1]
    chunks = -(-most // CHUNK)
    threads = min(torch.get_num_threads(), tasks * chunks)
    own = -(-kernel.worker_bytes(most, codes.rows) // 64) * 64
    sizes = {
        "weights": heads * codes.dim, "offsets": 4 * heads, "factors": 4 * heads,
        "maxima": 4 * heads * most, "totals": 4 * heads * most, "workspace": threads * own,
    }  # fmt: skip
    _held, place = scratch(sizes)  # to the end of this call
    job = kernel.Job(
        q=q.data_ptr(), group=q.shape[1] // codes.kv_heads, tasks=tasks,
        table=block_table.data_ptr(), table_row=block_table.stride(0), most=most,
        lens=seq_lens.data_ptr(), keep=keep.data_ptr(), sink_pages=sink_pages,
        window_pages=window_pages, out=out.data_ptr(), out_row=out.stride(0),
        worker_bytes=own, chunk=CHUNK, chunks=chunks, **place, **_places_of(codes),
    )  # fmt: skip
    address = ctypes.addressof(job)
    _, prepare, weigh, choose = _functions()
    prepare(address)
    run(weigh, address, threads)
    if not job.fault:
        job.next_worker = job.next_task = 0
        run(choose, address, min(threads, tasks))
    if job.fault:
        raise ValueError(f"block_table must hold pages in 0..{codes.pages - 1}; got others")
    return out


@functools.cache
def _functions() -> list[Callable]:
    stamp = stamp_of(Path(__file__).parent) ^ stamp_of(Path(numba_best.__file__).parent)
    entries = [
        make(stamp)
        for make in (
            kernel.encode_entry, kernel.prepare_entry, kernel.weigh_entry, kernel.choose_entry
        )
    ]  # fmt: skip
    return compiled("choice of pages", kernel.SIGNATURE, entries)
