"""Scores and weights of rows by their codes on a CPU: the scan of `select_rows`, without its
choice."""

import ctypes

import torch
from torch import Tensor

from . import numba_job
from .layout import Codes
from .numba import integers, places_of, places_of_functions, places_of_map, run_steps, steps_of
from .numba_job import CHUNK, PREPARE, SCAN
from .query_map import QueryMap


def coarse_scores(q: Tensor, codes: Codes, n: int, query_map: QueryMap) -> Tensor:
    """As `weights.coarse_scores`, whose checks are taken for granted."""
    found, _ = _scanned(q, codes, n, query_map, whole=False)
    bits = found.flatten(2)[..., :n].view(torch.int32)  # in the order of the scores: see `scan`
    return (bits ^ (bits >> 31 & 0x7FFFFFFF)).view(torch.float32)


def weigh_rows(q: Tensor, codes: Codes, n: int) -> tuple[Tensor, Tensor]:
    """As `weights.weigh_rows`, whose checks are taken for granted."""
    weights, maxima = _scanned(q, codes, n, None, whole=True)
    largest = maxima.amax(-1)
    weights *= (maxima - largest[..., None]).exp()[..., None]
    return weights.flatten(2)[..., :n], largest


def _scanned(q, codes, n: int, query_map, *, whole: bool) -> tuple[Tensor, Tensor]:
    """What `numba_scan.weigh_chunk` writes, in chunks `[H, G, chunks, CHUNK]`, and the largest
    score of each."""
    misplaced = codes.misplaced(q.device)
    if q.device.type != "cpu" or misplaced:
        raise ValueError(misplaced or f"impl 'numba' needs the CPU; got q on {q.device}")
    heads, group, dim = q.shape
    q = q.detach().resolve_neg().float().contiguous()
    chunks, coordinates = -(-n // CHUNK), codes.coordinates
    threads = min(torch.get_num_threads(), heads * chunks)
    worker_bytes = numba_job.worker_bytes(coordinates)
    found = torch.empty(heads, group, chunks, CHUNK, dtype=torch.float32)
    maxima, totals = torch.empty(2, heads, group, chunks, dtype=torch.float32)
    rows = integers(1)(n)
    mapped = query_map is not None
    sizes = numba_job.common_bytes(heads, group, coordinates, threads, worker_bytes, mapped)
    held = {name: torch.empty(size, dtype=torch.uint8) for name, size in sizes.items()}
    products = group * coordinates * dim
    steps = steps_of([(PREPARE, 1), (SCAN, chunks)], threads, heads, 0, products)
    job = numba_job.Job(
        q=q.data_ptr(), rows=ctypes.addressof(rows), scores=found.data_ptr(),
        maxima=maxima.data_ptr(), totals=totals.data_ptr(), tasks=heads, heads=heads,
        group=group, dim=dim, chunks=chunks, by_sequence=0, alone=0, whole=whole,
        worker_bytes=worker_bytes, **{name: t.data_ptr() for name, t in held.items()},
        **places_of(codes), **places_of_map(query_map), **places_of_functions(steps),
    )  # fmt: skip
    if query_map is None:
        job.mapped = job.q
    run_steps(job)
    return found, maxima
