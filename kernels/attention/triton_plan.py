"""How the Triton backend divides its work: block sizes from a table, grid and mode from shapes.

Nothing here looks at the values of `starts, lengths`, so planning needs no synchronisation.
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

MAX_GROUP = 16
MAX_HEAD_DIM = 256
INTERPRETER_PROGRAMS = 8
SHORT_GROUP_TILES = 16

Mode = Literal["stream", "group"]


class Blocks(NamedTuple):
    """Compile-time choices for one storage width and head_dim block.

    `per_sm` programs fit an SM by shared memory and registers: `tests/kernels/test_aot.py`
    holds every entry to that.
    """

    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None
    per_sm: int


# By bytes an element of k and v and by DIM_BLOCK. About 32 KiB of k and v in flight hide the
# latency of an H200's memory (4.8 TB/s over 132 SMs); the entries have 64 to 192 KiB. Where a
# third program would need fewer than 168 registers a thread, which Triton 3.9 achieves and 3.6
# does not, two with one buffer more are planned. Products of float32 (no tensor cores) spill a
# few bytes with most numbers of warps and register limits: these entries do not. Not yet tuned
# on a GPU: `python -m benchmarks.gpu --tune` times the alternatives.
AMPERE = {
    (2, 64): Blocks(128, 4, 3, 255, 2),
    (2, 128): Blocks(64, 4, 3, 255, 2),
    (2, 256): Blocks(32, 4, 3, 255, 2),
    (4, 64): Blocks(32, 8, 4, None, 2),
    (4, 128): Blocks(32, 16, 3, 64, 2),
    (4, 256): Blocks(32, 16, 2, 128, 1),
    (1, 64): Blocks(128, 4, 4, 255, 2),
    (1, 128): Blocks(64, 4, 4, 255, 2),
    (1, 256): Blocks(32, 4, 4, 255, 2),
}
HOPPER = {
    (2, 64): Blocks(128, 4, 4, 255, 2),
    (2, 128): Blocks(64, 4, 4, 255, 2),
    (2, 256): Blocks(32, 4, 4, 255, 2),
    (4, 64): Blocks(32, 8, 4, None, 2),
    (4, 128): Blocks(32, 16, 3, 128, 1),
    (4, 256): Blocks(32, 8, 2, None, 2),
    (1, 64): Blocks(128, 4, 4, 255, 2),
    (1, 128): Blocks(64, 4, 4, 255, 2),
    (1, 256): Blocks(32, 4, 4, 255, 2),
}


class Device(NamedTuple):
    """What a plan needs to know of a GPU: compute capability as in sm_90, and its SMs."""

    capability: int
    sms: int


INTERPRETER = Device(capability=0, sms=0)


@functools.cache
def _gpu(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(10 * properties.major + properties.minor, properties.multi_processor_count)


def device_of(tensor: Tensor) -> Device:
    if tensor.device.type != "cuda":
        return INTERPRETER
    index = tensor.device.index
    return _gpu(torch.cuda.current_device() if index is None else index)


def blocks_for(device: Device, element_bytes: int, head_dim: int) -> Blocks:
    key = (element_bytes, dim_block(head_dim))
    if device.capability in (90, 100, 103) or device == INTERPRETER:
        return HOPPER[key]
    blocks = AMPERE[key]
    # sm_80 and sm_87 have 164 KiB of shared memory an SM, the rest of their families 100 KiB.
    return blocks if device.capability in (80, 87) else blocks._replace(per_sm=1)


def dim_block(head_dim: int) -> int:
    """The power of two that a head_dim is padded to; at least 64."""
    return max(64, 1 << (head_dim - 1).bit_length())


@dataclass(frozen=True)
class Plan:
    """One step's division of work. `str(plan)` says it in words.

    Attributes:
        mode: `"stream"`, the tiles of all groups divided evenly over `programs` (LeanAttention);
            `"group"`, one program a group and no merge.
        programs: size of the grid: in stream mode as many as are resident at once.
        packed: groups have several ranges, which are packed into tiles without gaps.
        n_groups, group_size: lists of ranges, and the query heads that share one.
    """

    mode: Mode
    programs: int
    packed: bool
    n_groups: int
    group_size: int
    head_dim: int
    element_bytes: int
    blocks: Blocks
    reason: str

    def __str__(self) -> str:
        work = "several ranges packed into each tile" if self.packed else "one range a group"
        b = self.blocks
        return (
            f"{self.mode}: {self.programs} programs for {self.n_groups} groups of "
            f"{self.group_size} query heads ({self.reason}); tiles of {b.block_n} rows x "
            f"{self.head_dim}, {work}; {b.num_warps} warps, {b.num_stages} stages, "
            f"{b.per_sm} programs an SM"
        )


def make_plan(
    device: Device,
    q: Tensor,
    k: Tensor,
    starts: Tensor,
    *,
    mode: Mode | None = None,
    programs: int | None = None,
    blocks: Blocks | None = None,
) -> Plan:
    """Plans from shapes alone.

    One program a group is chosen where it cannot lose to stream-K: there are at least as many
    groups as resident programs, so none idles, and no group can be longer than
    `SHORT_GROUP_TILES` tiles, so none is left running alone, whatever the lengths turn out to
    be. It saves the search and the merge. A caller who knows that lengths are uniform may ask
    for it with `mode="group"`.

    Raises:
        ValueError: unknown mode; `programs` below 1 or given for mode "group".
    """
    batch, q_heads, head_dim = q.shape
    heads, n_ranges = starts.shape[1:]
    n_groups = batch * heads
    if blocks is None:
        blocks = blocks_for(device, k.element_size(), head_dim)
    resident = INTERPRETER_PROGRAMS if device == INTERPRETER else device.sms * blocks.per_sm
    if mode not in (None, "stream", "group"):
        raise ValueError(f"mode must be None, 'stream' or 'group'; got {mode!r}")
    if programs is not None and (programs < 1 or mode == "group"):
        raise ValueError(
            f"programs must be at least 1, and None with mode 'group'; got {programs} with mode "
            f"{mode!r}"
        )
    longest = math.ceil(k.shape[2] / blocks.block_n)
    if mode is not None or programs is not None:
        mode, reason = mode or "stream", "as asked"
    elif n_groups >= resident and longest <= SHORT_GROUP_TILES:
        mode, reason = "group", f"{resident} resident programs, {longest} tiles a group at most"
    else:
        mode, reason = "stream", f"{resident} resident programs, {longest} tiles a group at most"
    return Plan(
        mode=mode,
        programs=n_groups if mode == "group" else programs or resident,
        packed=n_ranges != 1,
        n_groups=n_groups,
        group_size=q_heads // heads,
        head_dim=head_dim,
        element_bytes=k.element_size(),
        blocks=blocks,
        reason=reason,
    )
