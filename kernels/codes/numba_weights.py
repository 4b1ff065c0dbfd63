"""Weights of rows by their codes on a CPU: the scan of `select_rows`, without its choice."""

import ctypes

import torch
from torch import Tensor

from . import numba_job
from .layout import Codes
from .numba import _integers, places_of, run_steps
from .numba_job import CHUNK, PREPARE, SCAN


def weigh_rows(q: Tensor, codes: Codes, n: int, *, whole: bool) -> tuple[Tensor, Tensor]:
    """As `weights.weigh_rows`, whose checks are taken for granted."""
    misplaced = codes.misplaced(q.device)
    if q.device.type != "cpu" or misplaced:
        raise ValueError(misplaced or f"impl 'numba' needs the CPU; got q on {q.device}")
    heads, group, coordinates = q.shape
    q = q.detach().resolve_neg().float().contiguous()
    chunks = -(-n // CHUNK)
    threads = min(torch.get_num_threads(), heads * chunks)
    worker_bytes = numba_job.worker_bytes(coordinates)
    weights = torch.empty(heads, group, chunks, CHUNK)
    maxima, totals = torch.empty(2, heads, group, chunks)
    rows = _integers(1)(n)
    sizes = numba_job.common_bytes(heads, group, coordinates, threads, worker_bytes, False)
    held = {name: torch.empty(size, dtype=torch.uint8) for name, size in sizes.items()}
    job = numba_job.Job(
        mapped=q.data_ptr(), rows=ctypes.addressof(rows), scores=weights.data_ptr(),
        maxima=maxima.data_ptr(), totals=totals.data_ptr(), tasks=heads, heads=heads,
        group=group, dim=coordinates, chunks=chunks, by_sequence=0, by_task=0, whole=whole,
        worker_bytes=worker_bytes, **{name: t.data_ptr() for name, t in held.items()},
        **places_of(codes),
    )  # fmt: skip
    run_steps(job, [(PREPARE, 1), (SCAN, chunks)], threads)
    largest = maxima.amax(-1)
    if not whole:  # int32 in the order of the scores: see `numba_simd.scan`
        bits = weights.flatten(2)[..., :n].view(torch.int32)
        scores = (bits ^ (bits >> 31 & 0x7FFFFFFF)).view(torch.float32)
        return (scores - largest[..., None]).exp(), largest
    weights *= (maxima - largest[..., None]).exp()[..., None]
    return weights.flatten(2)[..., :n], largest
