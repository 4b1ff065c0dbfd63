"""Choice of rows by coded keys on a CPU: task by task, or in steps of smaller units."""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from saap.kernels.cpu.functions import compiled, openmp_address, run, stamp_of
from saap.kernels.cpu.scratch import Layout

from . import numba_choice, numba_job, numba_scan
from .layout import Codes, candidates_of
from .numba_job import CANDIDATES, CHOOSE, FIND, PREPARE, SCAN, WEIGH
from .query_map import QueryMap

PER_THREAD = 1 << 18
"""Products of a map of queries that are worth a thread."""


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


def select_rows(
    a: Tensor, codes: Codes, n_rows: list[int], *, max_tokens: int, n_candidates: int,
    one_of: int | None, query_map: QueryMap | None, min_weight: float | None,
    outside: Tensor | None, first_row: int, out: tuple[Tensor, Tensor], scored: Tensor,
    left_out: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`a [n, H, G, P]`, or with a map `[n, H, G, D]`: queries of the G heads that share each of
    the H selections."""
    prepared = Prepared(
        a.shape, codes, n_rows, max_tokens=max_tokens, n_candidates=n_candidates, one_of=one_of,
        query_map=query_map, min_weight=min_weight, first_row=first_row, out=out, scored=scored,
        left_out=left_out,
    )  # fmt: skip
    used = prepared(a, outside)
    starts, lengths = out
    return starts[..., :used], lengths[..., :used]


class Prepared:
    """A choice of rows by the same codes as often as it is called, whatever these hold then.

    shape: of the queries that calls have.
    """

    def __init__(
        self, shape: tuple[int, ...], codes: Codes, n_rows: list[int], *, max_tokens: int,
        n_candidates: int, one_of: int | None, query_map: QueryMap | None,
        min_weight: float | None, first_row: int, out: tuple[Tensor, Tensor], scored: Tensor,
        left_out: Tensor | None,
    ):  # fmt: skip
        n, heads, group, dim = shape
        coordinates = codes.coordinates
        most = max(n_rows)
        tasks = n * heads
        least = 0 if min_weight is None else bits_of(min_weight)
        self._bounds = max_tokens, n_candidates, one_of, least, group
        chunks, whole, _, listed_chunks = self._sizes = _sizes(most, *self._bounds)
        threads = min(torch.get_num_threads(), tasks * chunks)
        plan = _plan(threads, tasks, group, *self._sizes)
        products = group * coordinates * dim
        self.steps = steps_of(plan.steps, plan.workers, tasks, plan.alone, products)
        worker_bytes = numba_job.worker_bytes(coordinates, most)
        self.buffers = {
            "counts": 8 * tasks,
            **numba_job.common_bytes(
                tasks, group, coordinates, plan.workers, worker_bytes, query_map is not None
            ),
            **numba_job.kept_bytes(plan.slots, group, most, numba_job.CHUNK * listed_chunks),
        }
        self.layout = Layout(self.buffers)
        starts, lengths = out
        self.rows = (ctypes.c_int64 * len(n_rows))(*n_rows)
        self.kept = codes, starts, lengths, scored, left_out, query_map  # addresses follow
        self.job = numba_job.Job(
            rows=ctypes.addressof(self.rows), scored=scored.data_ptr(),
            starts=starts.data_ptr(), lengths=lengths.data_ptr(),
            left_out=0 if left_out is None else left_out.data_ptr(),
            tasks=tasks, heads=heads, group=group, dim=dim, chunks=chunks,
            by_sequence=len(n_rows) > 1, whole=whole,
            alone=plan.alone, first_slot=plan.first_slot, heads_at_once=plan.heads_at_once,
            out_batch=4 * starts.stride(0), out_head=4 * starts.stride(1),
            capacity=starts.shape[2], first_row=first_row, max_tokens=max_tokens,
            least_weight=least, candidates=n_candidates, one_of=one_of or 0,
            worker_bytes=worker_bytes, listed_chunks=listed_chunks,
            **places_of(codes), **places_of_map(query_map), **places_of_functions(self.steps),
        )  # fmt: skip

    def follows(self, n_rows: list[int]) -> bool:
        """Whether its buffers and steps are those for so many rows; it chooses among them then."""
        if _sizes(max(n_rows), *self._bounds) != self._sizes:
            return False
        self.rows[:] = n_rows
        return True

    def __call__(self, a: Tensor, outside: Tensor | None = None) -> int:
        """Writes ranges and counts where it was told; returns the most ranges of a selection."""
        return self._run(self.layout, self.job, a, outside)

    def beside(
        self, k: Tensor, starts: Tensor, lengths: Tensor, mean: Tensor, sm_scale: float
    ) -> Callable[[Tensor], int] | None:
        """As `api.PreparedChoice.beside`."""
        contiguous = starts.is_contiguous() and lengths.is_contiguous() and mean.is_contiguous()
        alike = k.dtype == mean.dtype == torch.float32 and k.stride(-1) == 1
        if not (contiguous and alike and self.job.map) or k.is_neg() or mean.is_neg():
            return None
        job = type(self.job).from_buffer_copy(self.job)
        job.beside, job.mean = k.data_ptr(), mean.data_ptr()
        job.beside_starts, job.beside_lengths = starts.data_ptr(), lengths.data_ptr()
        job.beside_batch, job.beside_head, job.beside_row, _ = (4 * n for n in k.stride())
        job.beside_rows, job.beside_ranges = k.shape[2], starts.shape[2]
        job.sm_scale = sm_scale
        job.mean_batch = 4 * mean.stride(0) if len(mean) > 1 else 0
        kept = k, starts, lengths, mean  # their addresses are in the job
        layout = Layout(self.buffers)  # which knows one job
        return lambda a: self._run(layout, job, a, None, kept)

    def _run(self, layout: Layout, job, a: Tensor, outside: Tensor | None, *_kept: object) -> int:
        a = a.resolve_neg().contiguous()
        # A job of this call alone, since several threads may use one preparation.
        job, _held = layout.copy_of(job)  # held to the end of this call
        job.q = a.data_ptr()
        if not job.map:
            job.mapped = job.q
        if outside is not None:
            outside = outside.contiguous()
            job.outside = outside.data_ptr()
        return run_steps(job)


def _sizes(
    most: int, max_tokens: int, n_candidates: int, one_of: int | None, least: int, group: int
) -> tuple[int, bool, bool, int]:
    """What buffers and steps depend on: chunks of rows, whether all are candidates, whether all
    are chosen, chunks of candidates."""
    wanted = candidates_of(most, n_candidates, one_of)
    whole, every = wanted >= most, max_tokens >= most and not least
    candidates = 0 if whole else min(most, group * wanted)
    return -(-most // numba_job.CHUNK), whole, every, -(-candidates // numba_job.CHUNK)


class _Plan(NamedTuple):
    """Who does what. `alone`: tasks that are done by one worker each, which has a slot for it; the
    others' slots are from `first_slot` on."""

    steps: list[tuple[int, int]]
    workers: int
    alone: int
    first_slot: int
    slots: int
    heads_at_once: int


def _plan(threads, tasks, group, chunks, whole, every, listed_chunks) -> _Plan:
    # Rows scored by one thread and ranked by another go from cache to cache, which costs as much
    # as to score them: so whole tasks first, then heads, and chunks of rows where these are few.
    alone = tasks if every or tasks >= 8 * threads else tasks - tasks % threads
    left = tasks - alone
    by_head = not whole and left * group >= threads
    if left and not by_head:
        alone, left = 0, tasks
    heads_at_once = max(1, left * group // (2 * threads))
    find = FIND, -(-group // heads_at_once)
    if not left:
        steps = [find]
    elif by_head:
        steps = [find, (WEIGH, listed_chunks)]
    elif whole:
        steps = [(PREPARE, 1), (SCAN, chunks), (CHOOSE, 1)]
    else:
        steps = [(PREPARE, 1), (SCAN, chunks), (CANDIDATES, group), (WEIGH, listed_chunks)]
    workers = min(threads, alone + left * max(parts for _, parts in steps))
    first_slot = workers if steps[0] is find else 0
    return _Plan(steps, workers, alone, first_slot, first_slot + left, heads_at_once)


def steps_of(
    steps: list[tuple[int, int]], workers: int, tasks: int, alone: int, products: int
) -> ctypes.Array:
    """Steps, each in so many parts of every task that is not done alone, by at most so many
    workers, as a job has them. products: of a task's map of queries."""
    left, rows = tasks - alone, []
    for step, parts in steps:
        units = left * parts + (alone if step == FIND else 0)
        used = min(workers, units)
        if step == PREPARE:
            used = min(used, 1 + left * products // PER_THREAD)
        rows += [step, parts, units, used, 1 if step == FIND else used]
    return (ctypes.c_int64 * len(rows))(*rows)


def places_of_functions(steps: ctypes.Array) -> dict[str, int]:
    """A job's fields that say what is done in its steps, and by which functions."""
    _, choose, score = _functions()
    return {
        "choose": ctypes.cast(choose, ctypes.c_void_p).value, "score": score,
        "parallel": openmp_address(), "steps": ctypes.addressof(steps),
        "n_steps": len(steps) // numba_job.STEP_FIELDS,
    }  # fmt: skip


def run_steps(job: numba_job.Job) -> int:
    """Does all that the steps of a job say; returns the most ranges of a selection."""
    drive, choose, _ = _functions()
    address = ctypes.addressof(job)
    if job.parallel:
        drive(address)
        return job.used
    ctypes.memset(job.finished, 0, 8 * numba_job.STEPS * job.tasks)
    each = integers(numba_job.STEP_FIELDS)
    for row in (each * job.n_steps).from_address(job.steps):
        job.step, job.parts, job.units, workers, job.ahead = row
        job.next_worker = job.next_unit = 0
        run(choose, address, workers)
    return max(integers(job.tasks).from_address(job.counts)[:]) if job.counts else 0


def places_of(codes: Codes) -> dict[str, int]:
    """A job's fields that say where codes lie."""
    coarse, fine, scale = codes.coarse, codes.fine, codes.scale
    return {
        "coarse": coarse.data_ptr(), "fine": fine.data_ptr(), "scale": scale.data_ptr(),
        "kv_heads": scale.shape[1], "coordinates": codes.coordinates,
        "coarse_batch": 4 * coarse.stride(0), "coarse_head": 4 * coarse.stride(1),
        "coarse_plane": 4 * coarse.stride(2), "fine_batch": 4 * fine.stride(0),
        "fine_head": 4 * fine.stride(1), "scale_batch": scale.stride(0),
        "scale_head": scale.stride(1),
    }  # fmt: skip


def places_of_map(query_map: QueryMap | None) -> dict[str, int]:
    """A job's fields that say where a map lies, if there is one."""
    if query_map is None:
        return {}
    weights, scale = query_map.strides
    size = query_map.weights.element_size()
    return {
        "map": query_map.weights.data_ptr(), "map_scale": query_map.scale.data_ptr(),
        "map_bytes": size, "map_batch": size * weights, "map_scale_batch": 4 * scale,
    }  # fmt: skip


def bits_of(weight: float) -> int:
    """As an int32: weights, which are float32 not below 0, are in the order of their bits."""
    return max(1, ctypes.c_int32.from_buffer(ctypes.c_float(weight)).value)


@functools.cache
def integers(count: int) -> type:
    """An array of so many int64."""
    return ctypes.c_int64 * count


@functools.cache
def _functions() -> tuple[Callable, Callable, int]:
    """What does a job, what does a step of it, and the address of what scores a chunk."""
    stamp = stamp_of(Path(__file__).parent)
    scores = [numba_scan.score_entry(stamp)]
    score = compiled("scores of coded rows", numba_scan.SCORE_SIGNATURE, scores)[0]
    entries = [numba_choice.drive_entry(stamp), numba_choice.entry(stamp)]
    drive, choose = compiled("choice of coded rows", numba_job.SIGNATURE, entries)
    return drive, choose, ctypes.cast(score, ctypes.c_void_p).value
