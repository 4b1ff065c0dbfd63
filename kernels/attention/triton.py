"""LeanAttention (arXiv 2405.10480) for ragged ranges on a GPU, in Triton.

Up to three launches and no host synchronisation: `pack_ranges` (if a group has several ranges),
`attend_tiles`, and `combine_parts` (if groups are cut between programs). Lengths, ranges and
grid are runtime values, so a captured CUDA graph may be replayed after `starts, lengths` and
everything else were overwritten in place. Results are the same bit for bit from run to run:
parts merge in the order of the programs. Device code is in `triton_schedule`, `triton_kernels`
and `triton_combine`, block sizes and the choice of mode in `triton_plan`.

On CPU tensors it runs in Triton's interpreter, if `TRITON_INTERPRET=1` was set before triton was
imported (not for bfloat16, which the interpreter multiplies wrongly).
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from saap.kernels.backends.graphs import replayed
from saap.kernels.backends.launches import Launch, launch_all

from .int8_rows import parts_of, width
from .triton_checks import check_device, check_scales, check_tensors
from .triton_combine import combine_parts
from .triton_kernels import attend_tiles
from .triton_plan import MAX_GROUP, Mode, Plan, device_of, dim_block, make_plan
from .triton_schedule import pack_ranges

__all__ = ["MAX_GROUP", "Workspace", "attend_ranges", "explain", "make_workspace"]

INTERPRETED = not isinstance(attend_tiles, triton.JITFunction)
LOG2_E = math.log2(math.e)
COMBINE_DIMS = 64
COMBINE_PARTS = 64
MANY_RANGES = 512  # from there on more of them are looked at together, which takes registers


@dataclass(frozen=True, eq=False)
class Workspace:
    """Everything that a step writes, so that a step allocates nothing.

    `attend_ranges` returns `out` and `lse` of the workspace that it was given: the next call
    with the same workspace overwrites them. One workspace serves one stream at a time.
    """

    plan: Plan
    n_ranges: int
    out: Tensor
    lse: Tensor
    part_out: Tensor | None
    part_lse: Tensor | None
    tile_offsets: Tensor | None
    slots: Tensor | None
    used: Tensor | None
    bounds: Tensor | None
    shifts: Tensor | None


def attend_ranges(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    lengths: Tensor,
    *,
    sm_scale: float,
    softcap: float | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    workspace: Workspace | None = None,
    mode: Mode | None = None,
    programs: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact softmax attention of one query token over ranges of the rows of a KV store.

    Shapes are those of `api.attend_ranges`, whose validation is taken for granted; what only
    this backend limits is checked here.

    Args:
        q: `[B, Hq, D]`, float16, bfloat16 or float32; D a multiple of 16 up to 256.
        k, v: `[B, Hkv, N, D]` in q's dtype, or int8 or float8_e4m3fn with scales; any strides
            but D's. Or int8 with the scales in the rows, as `quantize_rows` makes them.
        starts, lengths: int32 `[B, Hkv, R]` or `[B, Hq, R]`, any strides; at most 16 query
            heads share one list. Values are not checked; a length below 0 counts as unused.
        sm_scale: factor of the scores.
        softcap: scores become `softcap * tanh(score / softcap)`; None is off.
        k_scale, v_scale: float32, broadcastable to `[B, Hkv, N]`, not negative: one scale a row
            of the store, by which its 8-bit values are multiplied. A scale for each bucket is
            repeated over the bucket's rows; a scale for each head is `[B, Hkv, 1]` and costs no
            memory.
        workspace: from `make_workspace` for the same shapes; None allocates.
        mode, programs: override the plan, see `triton_plan.make_plan`; not with a workspace.

    Returns:
        `out [B, Hq, D]` in q's dtype and `lse [B, Hq]`, float32, natural log; 0 and -inf where
        all ranges are empty.

    Raises:
        ValueError: a limit above, naming it and the value received.
    """
    if k_scale is None and v_scale is None:
        k, v, k_scale, v_scale = _with_scales(q, k, v)
    check_tensors(q, k, v, starts)
    check_device(q, k, device_of(q), INTERPRETED)
    check_scales(k, k_scale, v_scale)
    if workspace is None:
        workspace = make_workspace(q, k, starts, mode=mode, programs=programs)
    else:
        if mode is not None or programs is not None:
            raise ValueError(
                f"mode and programs must be None with a workspace, which has its own; got "
                f"{mode!r} and {programs}"
            )
        _check_workspace(workspace, q, k, starts)
    if k_scale is not None:
        k_scale, v_scale = k_scale.expand(k.shape[:3]), v_scale.expand(k.shape[:3])
    launch_all(
        launches(q, k, v, starts, lengths, k_scale, v_scale, workspace, sm_scale, softcap), q
    )
    return workspace.out, workspace.lse


class Prepared:
    """Attention over the same rows and ranges as often as it is called, whatever they hold then.

    On a GPU a call costs the host three launches: a copy of the queries, a replay, and a copy of
    what came out. q: of the shape that calls have.
    """

    def __init__(self, q, k, v, starts, lengths, *, sm_scale, softcap):
        k, v, *scales = _with_scales(q, k, v)
        check_tensors(q, k, v, starts)
        check_device(q, k, device_of(q), INTERPRETED)
        self.q = torch.empty_like(q, memory_format=torch.contiguous_format)
        self.workspace = make_workspace(q, k, starts)
        work = list(
            launches(self.q, k, v, starts, lengths, *scales, self.workspace, sm_scale, softcap)
        )
        self.run = replayed(functools.partial(launch_all, work, self.q), q.device)

    def __call__(self, q: Tensor) -> tuple[Tensor, Tensor]:
        self.q.copy_(q)
        self.run()
        return self.workspace.out.clone(), self.workspace.lse.clone()


def _with_scales(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, values and their scales, where int8 rows hold them; None for no scales."""
    if k.dtype != torch.int8 or k.shape[-1] != width(q.shape[-1], torch.int8):
        return k, v, None, None
    (k, k_scale), (v, v_scale) = parts_of(k), parts_of(v)
    return k, v, k_scale, v_scale


def make_workspace(
    q: Tensor,
    k: Tensor,
    starts: Tensor,
    *,
    mode: Mode | None = None,
    programs: int | None = None,
    plan: Plan | None = None,
) -> Workspace:
    """Buffers for steps whose tensors have these shapes and dtypes; values are not looked at.

    At most `2 * programs` parts of one group each are kept, whatever the context length.

    Raises:
        ValueError: as in `triton_plan.make_plan`.
    """
    plan = plan or make_plan(device_of(q), q, k, starts, mode=mode, programs=programs)
    n_ranges = starts.shape[2]

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    split = plan.mode == "stream"
    parts = (2 * plan.programs, plan.group_size)
    return Workspace(
        plan=plan,
        n_ranges=n_ranges,
        out=empty(*q.shape, dtype=q.dtype),
        lse=empty(*q.shape[:2], dtype=torch.float32),
        part_out=empty(*parts, plan.head_dim, dtype=torch.float32) if split else None,
        part_lse=empty(*parts, dtype=torch.float32) if split else None,
        tile_offsets=empty(plan.n_groups + 1) if split else None,
        slots=empty(*starts.shape[:2]) if plan.packed else None,
        used=empty(*starts.shape[:2]) if plan.packed else None,
        bounds=empty(*starts.shape) if plan.packed else None,
        shifts=empty(*starts.shape) if plan.packed else None,
    )


def explain(
    q: Tensor,
    k: Tensor,
    starts: Tensor,
    *,
    mode: Mode | None = None,
    programs: int | None = None,
) -> str:
    """How `attend_ranges` would divide the work of tensors with these shapes, and why."""
    return str(make_plan(device_of(q), q, k, starts, mode=mode, programs=programs))


def launches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    lengths: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    workspace: Workspace,
    sm_scale: float,
    softcap: float | None,
) -> Iterator[Launch]:
    """The kernels of one step with all their arguments; scales already `[B, Hkv, N]`."""
    w, plan, blocks = workspace, workspace.plan, workspace.plan.blocks
    heads, n_ranges = starts.shape[1:]
    if plan.n_groups == 0:
        return
    many = n_ranges > MANY_RANGES
    if plan.packed:
        yield Launch(
            pack_ranges,
            (plan.n_groups,),
            {
                "starts": starts,
                "lengths": lengths,
                "bounds": w.bounds,
                "shifts": w.shifts,
                "slots": w.slots,
                "used": w.used,
                **_strides("starts", starts, "batch", "head", "range"),
                **_strides("lengths", lengths, "batch", "head", "range"),
                "heads": heads,
                "n_ranges": n_ranges,
                "RANGE_BLOCK": 2048 if many else 512,
            },
            {"num_warps": 8 if many else 4},
        )
    slots = w.slots if plan.packed else lengths
    options = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
    if blocks.max_registers is not None:
        options["maxnreg"] = blocks.max_registers
    yield Launch(
        attend_tiles,
        (plan.programs,),
        {
            "q": q,
            "k": k,
            "v": v,
            "k_scale": k_scale,
            "v_scale": v_scale,
            "starts": starts,
            "slots": slots,
            "bounds": w.bounds,
            "shifts": w.shifts,
            "used": w.used,
            "out": w.out,
            "lse": w.lse,
            "part_out": w.part_out,
            "part_lse": w.part_lse,
            "tile_offsets": w.tile_offsets,
            **_strides("q", q, "batch", "head"),
            **_strides("k", k, "batch", "head", "row"),
            **_strides("v", v, "batch", "head", "row"),
            **_strides("k_scale", k_scale, "batch", "head", "row"),
            **_strides("v_scale", v_scale, "batch", "head", "row"),
            **_strides("starts", starts, "batch", "head"),
            **_strides("slots", slots, "batch", "head"),
            "n_groups": plan.n_groups,
            "heads": heads,
            "group_size": plan.group_size,
            "heads_per_kv": heads // k.shape[1],
            "n_ranges": n_ranges,
            "programs": plan.programs,
            "score_scale": sm_scale * LOG2_E if softcap is None else sm_scale / softcap,
            "softcap": 0.0 if softcap is None else softcap * LOG2_E,
            "HEAD_DIM": plan.head_dim,
            "DIM_BLOCK": dim_block(plan.head_dim),
            "GROUP_BLOCK": MAX_GROUP,
            "BLOCK_N": blocks.block_n,
            "RANGE_BLOCK": 2048 if many else 256,
            "GROUPS_BLOCK": 512,
            "PACKED": plan.packed,
            "SPLIT": plan.mode == "stream",
            "SOFTCAP": softcap is not None,
        },
        options,
    )
    if plan.mode == "stream":
        yield Launch(
            combine_parts,
            (plan.n_groups * plan.group_size, triton.cdiv(plan.head_dim, COMBINE_DIMS)),
            {
                "part_out": w.part_out,
                "part_lse": w.part_lse,
                "tile_offsets": w.tile_offsets,
                "out": w.out,
                "lse": w.lse,
                "n_groups": plan.n_groups,
                "group_size": plan.group_size,
                "programs": plan.programs,
                "HEAD_DIM": plan.head_dim,
                "DIM_BLOCK": COMBINE_DIMS,
                "PARTS_BLOCK": COMBINE_PARTS,
            },
            {"num_warps": 4},
        )


def _strides(name: str, tensor: Tensor | None, *dims: str) -> dict[str, int]:
    strides = (0,) * len(dims) if tensor is None else tensor.stride()
    return {f"{name}_{dim}": stride for dim, stride in zip(dims, strides, strict=False)}


def _check_workspace(workspace: Workspace, q: Tensor, k: Tensor, starts: Tensor) -> None:
    plan, out = workspace.plan, workspace.out
    have = (tuple(out.shape), out.dtype, out.device, plan.n_groups, workspace.n_ranges)
    need = (tuple(q.shape), q.dtype, q.device, q.shape[0] * starts.shape[1], starts.shape[2])
    if have != need or plan.element_bytes != k.element_size():
        raise ValueError(
            f"workspace must be for q {need[:3]}, {need[3]} groups of {need[4]} ranges and k of "
            f"{k.element_size()} bytes per element; got one for {have[:3]}, {have[3]} groups of "
            f"{have[4]} ranges and k of {plan.element_bytes}"
        )
