"""What the Triton backend promises beside numbers: workspaces, limits, the choice of mode."""

from typing import Any

import pytest
import torch

from saap.kernels.attention import api
from saap.kernels.attention.api import PreparedRanges
from saap.kernels.attention.triton_plan import Device, make_plan

from .triton_cases import CUDA, DEVICE, MARKS, Case, Inputs, attend, backend, check, make_inputs

pytestmark = MARKS
INT8 = torch.int8


def test_through_the_api():
    case = Case("dense", batch=2, q_heads=8, rows=150)
    inputs = make_inputs(case, torch.float16)
    seqlens = torch.tensor([150, 77], dtype=torch.int32, device=DEVICE)
    lengths = seqlens[:, None, None].expand(2, case.kv_heads, 1)
    dense = Inputs(inputs.q, inputs.k, inputs.v, torch.zeros_like(lengths), lengths)
    check(dense, case, api.attend_dense(inputs.q, inputs.k, inputs.v, seqlens, impl="triton"))


@pytest.mark.parametrize("kind", ["dense", "ragged"])
def test_a_preparation_is_the_call(kind):
    """Of other queries and ranges, too, and often enough that a GPU replays it."""
    case = Case(kind)
    inputs = make_inputs(case, torch.float16)
    prepared = PreparedRanges(*vars(inputs).values(), impl="triton")
    for seed in range(5):
        fresh = make_inputs(case, torch.float16, seed)
        for own, value in zip(vars(inputs).values(), vars(fresh).values(), strict=True):
            own.copy_(value)
        for a, b in zip(prepared(fresh.q), attend(fresh, case), strict=True):
            assert torch.equal(a, b)


def poison(workspace: backend.Workspace) -> None:
    for buffer in vars(workspace).values():
        if isinstance(buffer, torch.Tensor):
            buffer.fill_(torch.nan if buffer.is_floating_point() else -(2**31))


@pytest.mark.parametrize("kind", ["dense", "ragged"])
def test_a_workspace_serves_other_lengths_and_ranges(kind):
    """What a replayed CUDA graph does: the same launches over buffers full of old values."""
    case = Case(kind, batch=2, rows=400)
    first = make_inputs(case, torch.float16)
    workspace = backend.make_workspace(first.q, first.k, first.starts)
    for seed in range(3):
        inputs = make_inputs(case, torch.float16, seed)
        poison(workspace)
        out, lse = attend(inputs, case, workspace=workspace)
        assert out is workspace.out
        check(inputs, case, (out, lse))


REFUSED = {
    "q's dtype": ({"q": torch.float64}, "float64"),
    "k's dtype": (
        {"k": torch.float32, "v": torch.float32},
        "k must have q's dtype, .*; got torch.float32",
    ),
    "no scales": ({"k": INT8, "v": INT8}, "k_scale must be given with k of torch.int8; got None"),
    "8 bits with fp32": (
        {"q": torch.float32, "k": INT8, "v": INT8},
        "q must have a dtype of 16 bits",
    ),
}


@pytest.mark.parametrize(("dtypes", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_dtypes(dtypes, message):
    inputs = make_inputs(Case(), torch.float16)
    tensors = {name: x.to(dtypes.get(name, x.dtype)) for name, x in vars(inputs).items()}
    with pytest.raises(ValueError, match=message):
        backend.attend_ranges(**tensors, sm_scale=1.0)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case(head_dim=72), "head_dim must be a multiple of 16 .*; got 72"),
        (Case(head_dim=272, rows=20, n_ranges=1), "head_dim must be .*; got 272"),
        (Case(q_heads=17, kv_heads=1), "at most 16 query heads .*; got 17"),
        (Case(options={"mode": "split"}), "mode must be .*; got 'split'"),
        (Case(options={"programs": 0}), "programs must be at least 1.*; got 0"),
        (
            Case(options={"programs": 2, "mode": "group"}),
            "programs must be .*; got 2 with mode 'group'",
        ),
        (
            Case(options={"k_scale": torch.ones(1)}),
            "k_scale must be None with k of torch.float16; got a tensor",
        ),
    ],
    ids=str,
)
def test_refused_limits(case, message):
    with pytest.raises(ValueError, match=message):
        attend(make_inputs(case, torch.float16), case)


def test_refused_strides_scales_and_workspaces():
    case = Case()
    inputs = make_inputs(case, torch.float16)
    swapped = inputs.k.transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(ValueError, match="k must have stride 1 over D"):
        attend(Inputs(inputs.q, swapped, *list(vars(inputs).values())[2:]), case)
    eight = Inputs(inputs.q, inputs.k.to(INT8), inputs.v.to(INT8), inputs.starts, inputs.lengths)
    one, wrong = torch.ones(1, device=DEVICE), torch.ones(7, device=DEVICE)
    with pytest.raises(ValueError, match=r"v_scale must be .*; got torch.float32 \(7,\)"):
        attend(eight, case, k_scale=one, v_scale=wrong)
    workspace = backend.make_workspace(inputs.q, inputs.k, inputs.starts[..., :2])
    with pytest.raises(ValueError, match="groups of 2 ranges"):
        attend(inputs, case, workspace=workspace)
    with pytest.raises(ValueError, match="must be None with a workspace, which has its own"):
        attend(inputs, case, workspace=workspace, programs=2)


@pytest.mark.skipif(CUDA, reason="about the interpreter")
def test_the_interpreter_refuses_bfloat16():
    with pytest.raises(ValueError, match="bfloat16"):
        attend(make_inputs(Case(), torch.bfloat16), Case())


def test_the_gate_looks_at_shapes_and_explains_itself():
    h200 = Device(capability=90, sms=132)

    def plan(batch: int, rows: int, n_ranges: int = 1, **options: Any):
        q = torch.empty(batch, 32, 128, dtype=torch.bfloat16, device="meta")
        k = torch.empty(batch, 8, rows, 128, dtype=torch.bfloat16, device="meta")
        starts = torch.empty(batch, 8, n_ranges, dtype=torch.int32, device="meta")
        return make_plan(h200, q, k, starts, **options)

    assert plan(1, 2**17).mode == "stream"
    assert plan(64, 2**17).mode == "stream"
    assert plan(64, 1024).mode == "group"
    assert plan(64, 1024).programs == 512
    assert plan(8, 1024).mode == "stream"
    assert plan(64, 1024, mode="stream").mode == "stream"
    assert plan(1, 2**17, mode="group").programs == 8
    assert "264 programs for 8 groups of 4" in str(plan(1, 2**17))
    assert "packed" in str(plan(1, 2**17, n_ranges=64))
