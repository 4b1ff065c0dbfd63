"""Block sizes, warps, stages and programs an SM of the Triton backend, compared on a GPU.

What it finds belongs in the table of `kernels/attention/triton_plan.py`, where
`tests/kernels/test_aot.py` checks that it fits the chips.
"""

import itertools

import numpy as np
import torch

from saap.kernels.attention import triton as backend
from saap.kernels.attention.triton_plan import Blocks, device_of, make_plan

from .gpu_sections import (
    HEAD_DIM,
    KV_HEADS,
    Bench,
    bucket_lists,
    dense_ranges,
    ours,
)


def tune(bench: Bench) -> None:
    """Times every candidate on a long dense row, a ragged batch and a 5 % selection."""
    candidates = [
        Blocks(block_n, warps, stages, registers, per_sm)
        for block_n, warps, (stages, per_sm, registers) in itertools.product(
            (32, 64, 128), (4, 8), STAGES_PROGRAMS_REGISTERS
        )
    ]
    long, batch = bench.context("128k"), 8
    lengths = np.exp(np.random.default_rng(batch).uniform(0, np.log(128), batch))
    lengths = (lengths * bench.context("128k") / 128).astype(int)
    arrays = bucket_lists(
        bench, KV_HEADS, bench.context("171k"), bench.context("171k") // 20, True
    )
    selected = tuple(bench.ranges(x).view(1, KV_HEADS, -1) for x in arrays)
    shapes = {
        "dense": (1, long, dense_ranges(bench, np.full(1, long)), KV_HEADS * long),
        "ragged": (batch, long, dense_ranges(bench, lengths), KV_HEADS * int(lengths.sum())),
        "selection": (1, bench.context("171k"), selected, int(arrays[1].sum())),
    }
    for blocks in candidates:
        if bench.left_s() < 5:
            return
        for name, (batch, rows, (starts, held), total) in shapes.items():
            q = bench.queries(batch)
            stores = bench.pool.views(batch, KV_HEADS, rows, HEAD_DIM)[:8]
            plan = make_plan(device_of(q), q, stores[0][0], starts, blocks=blocks)
            try:
                calls = [ours(q, k, v, starts, held, plan=plan) for k, v in stores]
                bench.time("tune", "saap", calls, total, shape=name, blocks=tuple(blocks))
            except backend.triton.OutOfResources:
                break
    best = {
        name: sorted(
            (r["ms"], r["blocks"]) for r in bench.records if r.get("shape") == name and "ms" in r
        )[:5]
        for name in shapes
    }
    for name, rows in best.items():
        for ms, blocks in rows:
            print(f"{name}: {1e3 * ms:.1f} us {Blocks(*blocks)}", flush=True)
    torch.cuda.empty_cache()


STAGES_PROGRAMS_REGISTERS = [
    (2, 4, 128),
    (3, 2, 255),
    (3, 3, 168),
    (4, 1, 255),
    (4, 2, 255),
    (5, 1, 255),
    (6, 1, 255),
]
