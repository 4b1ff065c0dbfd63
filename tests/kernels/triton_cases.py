"""Inputs of the Triton tests, and the choice of where they run: on a GPU, else in the interpreter.

The interpreter has to be chosen before triton is imported, so without a GPU the tests that import
this are skipped, but in the child process of `test_triton_interpreter.py`.
"""

import os
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from .budget import assert_within_budget

CUDA = torch.cuda.is_available()
if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_triton_interpreter.py", allow_module_level=True)

backend = pytest.importorskip("saap.kernels.attention.triton")

MARKS = [pytest.mark.gpu] if CUDA else []
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * CUDA


@dataclass(frozen=True)
class Case:
    """`kind` of ranges: "dense", one a group; "ragged", some of them empty; "tokens", length 1."""

    kind: str = "ragged"
    batch: int = 1
    q_heads: int = 4
    kv_heads: int = 2
    rows: int = 300
    head_dim: int = 64
    n_ranges: int = 6
    per_query_head: bool = False
    softcap: float | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Inputs:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor


def make_ranges(case: Case, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    heads = case.q_heads if case.per_query_head else case.kv_heads
    n_ranges = 1 if case.kind == "dense" else case.n_ranges
    starts = torch.zeros(case.batch, heads, n_ranges, dtype=torch.int32)
    lengths = torch.zeros_like(starts)
    for start, length in zip(starts.view(-1, n_ranges), lengths.view(-1, n_ranges), strict=True):
        if case.kind == "dense":
            length[:] = torch.randint(1, case.rows + 1, (1,), generator=draw)
        elif case.kind == "tokens":
            start[:] = torch.randperm(case.rows, generator=draw)[:n_ranges]
            length[:] = torch.rand(n_ranges, generator=draw) < 0.9
        else:
            cuts = torch.randperm(case.rows + 1, generator=draw)[: 2 * n_ranges].sort().values
            order = torch.randperm(n_ranges, generator=draw)
            start[:] = cuts[::2][order]
            length[:] = (cuts[1::2] - cuts[::2])[order]
            length[torch.rand(n_ranges, generator=draw) < 0.3] = 0
    return starts.to(DEVICE), lengths.to(DEVICE)


def make_inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> Inputs:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw).to(DEVICE, dtype)

    store = (case.batch, case.kv_heads, case.rows, case.head_dim)
    q = normal(case.batch, case.q_heads, case.head_dim)
    return Inputs(q, normal(*store), normal(*store), *make_ranges(case, seed))


def attend(inputs: Inputs, case: Case, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    options = {"softcap": case.softcap, **case.options, **options}
    return backend.attend_ranges(
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.starts,
        inputs.lengths,
        sm_scale=case.head_dim**-0.5,
        **options,
    )


def check(
    inputs: Inputs, case: Case, result: tuple[torch.Tensor, torch.Tensor], k=None, v=None
) -> None:
    """`k, v`: the store in q's dtype, where the inputs hold it in 8 bits."""
    k, v = inputs.k if k is None else k, inputs.v if v is None else v
    assert_within_budget(
        result,
        (inputs.q, k, v, inputs.starts, inputs.lengths),
        sm_scale=case.head_dim**-0.5,
        softcap=case.softcap,
    )
