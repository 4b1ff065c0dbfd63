"""What one choice of rows works on, and the buffers of a worker."""

import numba
from numba import carray

from saap.kernels.cpu.emitter import LANES
from saap.kernels.cpu.jobs import job_type, offset_of
from saap.kernels.cpu.memory import int64_pointer
from saap.kernels.cpu.scratch import whole_lines

from .layout import CODED, FINE_PLANES
from .numba_simd import BLOCK, WIDEST

FIELDS = (
    "q map map_scale mapped coarse fine scale rows weights factors scores maxima "  # addresses
    "totals starts lengths counts scored outside marks listed listed_scores listed_maxima "
    "found finished left_out sums beside beside_starts beside_lengths mean "
    "tasks heads kv_heads group coordinates dim chunks by_sequence whole "
    "alone first_slot heads_at_once "
    "map_bytes map_batch map_scale_batch coarse_batch coarse_head coarse_plane "  # bytes
    "fine_batch fine_head scale_batch scale_head "
    "beside_batch beside_head beside_row beside_rows beside_ranges mean_batch "
    "out_batch out_head capacity first_row max_tokens least_weight candidates one_of "
    "listed_chunks "
    "score choose parallel steps n_steps used "
    "step parts units ahead workspace worker_bytes next_worker next_unit"
).split()
NEXT_WORKER = offset_of(FIELDS, "next_worker")
NEXT_UNIT = offset_of(FIELDS, "next_unit")

Job, SIGNATURE = job_type(FIELDS, ("sm_scale",))

CHUNK = 512
"""Rows of a unit of work, whole blocks: their words and scores stay in the first-level cache."""

STEPS = 6
FIND, PREPARE, SCAN, CANDIDATES, WEIGH, CHOOSE = range(STEPS)
"""Steps of a choice, in `parts` of each task."""

STEP_FIELDS = 5
"""Numbers that tell what a step does: itself, parts of a task, units in all, workers, `ahead`."""

_njit = numba.njit(error_model="numpy")


@_njit
def words_of(coordinates):
    """Coarse words of a key, and fine ones of each kind."""
    return coordinates // CODED


@_njit
def planes_bytes(coordinates):
    """Bytes of the words of a chunk, plane by plane."""
    return 4 * CHUNK * (1 + FINE_PLANES) * words_of(coordinates)


@_njit
def chunk_bytes(coordinates):
    """Bytes that a chunk needs: words, numbers of rows, scales, the largest scores."""
    return planes_bytes(coordinates) + 4 * CHUNK + CHUNK + 4 * WIDEST


@_njit
def candidates_of(job, n):
    """`layout.candidates_of` of a task's n rows."""
    if job.one_of == 0:
        return job.candidates
    return max(job.candidates, (n + job.one_of - 1) // job.one_of)


def whole_chunks(n: int) -> int:
    """Rows filled up to whole chunks."""
    return -(-n // CHUNK) * CHUNK


def worker_bytes(coordinates: int, listed: int = 0) -> int:
    """Bytes that a worker needs: for a chunk, or for a list of so many rows and what is sorted for
    it."""
    return whole_lines(max(chunk_bytes(coordinates), 4 * (whole_chunks(listed) + LANES)))


def common_bytes(
    tasks: int, group: int, coordinates: int, workers: int, worker_bytes: int, mapped: bool
) -> dict[str, int]:
    """Bytes that every job needs, whatever its steps are. mapped: whether it has a map."""
    return {
        **({"mapped": 4 * tasks * group * coordinates} if mapped else {}),
        "finished": 8 * STEPS * tasks,
        "workspace": workers * worker_bytes,
        "weights": 2 * tasks * group * coordinates,
        "factors": 16 * tasks * group,
    }


def kept_bytes(slots: int, group: int, most: int, candidates: int) -> dict[str, int]:
    """Bytes of what a choice keeps of so many tasks at a time."""
    room, listed = whole_chunks(most), whole_chunks(candidates)
    chunks, listed_chunks = room // CHUNK, listed // CHUNK
    return {
        "scores": 4 * slots * group * room,
        "maxima": 4 * slots * group * chunks,
        "totals": 4 * slots * group * chunks,
        "marks": slots * group * room // 8,
        "listed": 4 * slots * (listed + LANES),
        "listed_scores": 4 * slots * group * listed,
        "listed_maxima": 4 * slots * group * listed_chunks,
        "found": 8 * slots,
        "sums": 4 * slots * (listed or room),
    }


@_njit
def place_of(job, task):
    """Sequence, KV head and number of rows of a task."""
    b = task // job.heads if job.by_sequence else 0
    kv_head = task % job.heads * job.kv_heads // job.heads
    return b, kv_head, carray(int64_pointer(job.rows), b + 1)[b]


@_njit
def blocks_of(n):
    return (n + BLOCK - 1) // BLOCK
