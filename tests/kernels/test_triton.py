"""The Triton backend against the float64 reference."""

import dataclasses

import pytest
import torch

from saap.kernels.attention import dequantize_rows, quantize_rows

from .triton_cases import (
    CUDA,
    DEVICE,
    DTYPES,
    MARKS,
    Case,
    Inputs,
    attend,
    backend,
    check,
    make_inputs,
)

pytestmark = MARKS
FP8, INT8 = torch.float8_e4m3fn, torch.int8

CASES = {
    "dense": Case("dense", batch=2),
    "dense-longer-than-programs": Case("dense", rows=700, options={"programs": 3}),
    "dense-one-program": Case("dense", batch=2, options={"programs": 1}),
    "dense-more-programs-than-tiles": Case("dense", options={"programs": 40}),
    "dense-by-group": Case("dense", batch=2, options={"mode": "group"}),
    "ragged": Case(batch=2),
    "ragged-one-program": Case(batch=2, options={"programs": 1}),
    "ragged-by-group": Case(batch=2, options={"mode": "group"}),
    "one-token-ranges": Case("tokens", n_ranges=150),
    "more-ranges-than-a-block": Case("tokens", rows=800, n_ranges=700, kv_heads=1),
    "more-ranges-than-a-large-block": Case("tokens", rows=2300, n_ranges=2100, kv_heads=1),
    "one-row": Case("dense", rows=1, batch=2),
    "odd-rows": Case(rows=131, n_ranges=3),
    "no-group": Case(q_heads=3, kv_heads=3),
    "multi-query": Case(q_heads=8, kv_heads=1),
    "full-group": Case(q_heads=16, kv_heads=1),
    "a-list-for-each-query-head": Case(per_query_head=True, q_heads=6, kv_heads=2),
    "dim-16": Case(head_dim=16),
    "dim-80": Case(head_dim=80),
    "dim-96": Case(head_dim=96),
    "dim-128": Case(head_dim=128),
    "dim-256": Case(head_dim=256, rows=200),
    "softcap": Case(softcap=1.5),
    "softcap-far-away": Case("dense", softcap=50.0),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_the_reference(case, dtype):
    inputs = make_inputs(case, dtype)
    check(inputs, case, attend(inputs, case))


@pytest.mark.parametrize("case", [CASES["ragged"], CASES["dim-80"], CASES["one-token-ranges"]])
def test_int8_rows_hold_their_scales(case):
    inputs = make_inputs(case, torch.float16)
    k, v = quantize_rows(inputs.k), quantize_rows(inputs.v)
    stored = dataclasses.replace(inputs, k=k, v=v)
    check(inputs, case, attend(stored, case), dequantize_rows(k), dequantize_rows(v))


@pytest.mark.parametrize("group", range(1, 17))
def test_every_group_size(group):
    case = Case(q_heads=group, kv_heads=1, rows=90, n_ranges=2)
    inputs = make_inputs(case, torch.float16, seed=group)
    check(inputs, case, attend(inputs, case))


@pytest.mark.parametrize("options", [{}, {"programs": 1}, {"mode": "group"}], ids=str)
@pytest.mark.parametrize("kind", ["dense", "ragged"])
def test_empty_groups_are_written(kind, options):
    case = Case(kind, batch=3, options=options)
    inputs = make_inputs(case, torch.float16)
    inputs.lengths[1] = 0
    inputs.lengths[2, 1] = 0
    inputs.starts[1] = -7
    out, lse = attend(inputs, case)
    assert (out[1] == 0).all()
    assert (lse[1] == -torch.inf).all()
    check(inputs, case, (out, lse))
    inputs.lengths[1] = -3
    for a, b in zip((out, lse), attend(inputs, case), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", [{}, {"mode": "group"}], ids=str)
@pytest.mark.parametrize(("batch", "rows", "n_ranges"), [(2, 50, 0), (2, 0, 1), (0, 50, 3)])
def test_nothing_to_attend_to(batch, rows, n_ranges, options):
    q = torch.randn(batch, 4, 64, dtype=torch.float16, device=DEVICE)
    k = torch.randn(batch, 2, rows, 64, dtype=torch.float16, device=DEVICE)
    ranges = torch.zeros(batch, 2, n_ranges, dtype=torch.int32, device=DEVICE)
    out, lse = backend.attend_ranges(q, k, k, ranges, ranges, sm_scale=1.0, **options)
    assert out.shape == q.shape
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("kind", ["dense", "ragged"])
def test_rows_that_no_range_selects_are_never_used(kind):
    case = Case(kind)
    inputs = make_inputs(case, torch.float32)
    clean = attend(inputs, case)
    for group in range(case.kv_heads):
        unused = torch.ones(case.rows, dtype=torch.bool)
        for start, length in zip(inputs.starts[0, group], inputs.lengths[0, group], strict=True):
            unused[start : start + length] = False
        inputs.k[0, group, unused] = torch.nan
        inputs.v[0, group, unused] = torch.inf
    for a, b in zip(clean, attend(inputs, case), strict=True):
        assert torch.equal(a, b)


def test_runs_are_bit_equal():
    case = Case(batch=2, rows=400, options={"programs": 5})
    inputs = make_inputs(case, torch.float16)
    first = attend(inputs, case)
    for _ in range(50 if CUDA else 1):
        for a, b in zip(first, attend(inputs, case), strict=True):
            assert torch.equal(a, b)


def test_more_groups_than_a_block_of_the_search():
    case = Case("dense", batch=260, q_heads=2, kv_heads=2, rows=5, head_dim=16)
    inputs = make_inputs(case, torch.float16)
    inputs.lengths[torch.arange(260) % 3 == 0] = 0
    check(inputs, case, attend(inputs, case))


def test_strided_views_are_read_in_place():
    case = Case(batch=2)
    inputs = make_inputs(case, torch.float16)
    token_major = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (inputs.k, inputs.v)]
    fused_q = torch.cat([inputs.q, inputs.q], dim=1)[:, : case.q_heads]
    wide = [torch.stack([x, x - 1], dim=-1)[..., 0] for x in (inputs.starts, inputs.lengths)]
    strided = Inputs(fused_q, *token_major, *wide)
    assert not any(x.is_contiguous() for x in vars(strided).values())
    for a, b in zip(attend(inputs, case), attend(strided, case), strict=True):
        assert torch.equal(a, b)


def test_offsets_past_two_to_the_31(tmp_path):
    """A store of 5 GB of which a few rows are touched: on the CPU a sparse file."""
    rows, dim, row_stride = 18, 64, 2**27
    size = rows * row_stride
    if CUDA:
        storage = torch.empty(size, dtype=torch.float16, device=DEVICE)
    else:
        storage = torch.from_file(
            str(tmp_path / "store"), shared=True, size=size, dtype=torch.float16
        )
    k = storage.as_strided((1, 1, rows, dim), (size, size, row_stride, 1))
    q = torch.randn(1, 2, dim, device=DEVICE).half()
    k.copy_(torch.randn(1, 1, rows, dim))
    for n_ranges in (1, 2):
        starts = torch.tensor([[[10, 1][:n_ranges]]], dtype=torch.int32, device=DEVICE)
        lengths = torch.tensor([[[8, 2][:n_ranges]]], dtype=torch.int32, device=DEVICE)
        compact = k.contiguous()
        options = {"sm_scale": 0.125, "softcap": None}
        for a, b in zip(
            backend.attend_ranges(q, k, k, starts, lengths, **options),
            backend.attend_ranges(q, compact, compact, starts, lengths, **options),
            strict=True,
        ):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [INT8, FP8], ids=str)
@pytest.mark.parametrize("per_row", [True, False], ids=["per-row", "per-head"])
@pytest.mark.parametrize("kind", ["dense", "ragged"])
def test_eight_bit_storage(kind, per_row, dtype):
    case = Case(kind, softcap=20.0)
    inputs = make_inputs(case, torch.float16)
    stored, scales, restored = [], [], []
    for x in (inputs.k, inputs.v):
        x = x.float() * torch.logspace(-3, 0, case.rows, device=DEVICE)[:, None]
        scale = x.abs().amax((-1,) if per_row else (-2, -1), keepdim=True)
        scale = scale / (127 if dtype == INT8 else 448)
        scaled = x / scale
        stored.append((scaled.round() if dtype == INT8 else scaled).to(dtype))
        scales.append(scale[..., 0])
        restored.append(stored[-1].float() * scale)
    inputs = Inputs(inputs.q, *stored, inputs.starts, inputs.lengths)
    result = attend(inputs, case, k_scale=scales[0], v_scale=scales[1])
    check(inputs, case, result, *restored)
