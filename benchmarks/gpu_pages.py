"""What a decode step inside vLLM costs on a GPU: rows of a paged cache, chosen by codes, visited.

Pages of 16 tokens in any order, in bfloat16; beside it dense attention over as many rows that lie
together, which is what a paged kernel may at best be.
"""

import torch

from saap.kernels.pages import PageCodes, encode_rows
from saap.vllm.options import Options
from saap.vllm.rotations import rotation_on
from saap.vllm.rows import attend_rows

from . import gpu_peers as peers
from .gpu_sections import HEAD_DIM, KV_HEADS, SCALE, Bench

PAGE, VISITED, CODED_AT_ONCE = 16, 0.1, 4096  # tokens, share, pages


def paged(bench: Bench, batch: int, context: str) -> None:
    rows = bench.context(context) // PAGE * PAGE
    shape = {"batch": batch, "context": context, "rows": rows, "share": VISITED}
    if not bench.room("paged", (2 * batch, KV_HEADS, rows, HEAD_DIM), **shape):
        return
    stores = bench.pool.views(batch, KV_HEADS, rows, HEAD_DIM)[:1]
    bench.time_peers(
        "paged", peers.SDPA, (bench.queries(batch), stores, None), batch * KV_HEADS * rows, **shape
    )
    pages = batch * rows // PAGE
    cache = torch.randn(
        pages, PAGE, KV_HEADS, 2 * HEAD_DIM, device=bench.device, dtype=bench.dtype
    ).transpose(1, 2)
    codes = PageCodes.empty(pages, KV_HEADS, PAGE, HEAD_DIM, bench.device)
    for first in range(0, pages, CODED_AT_ONCE):
        part = cache[first : first + CODED_AT_ONCE, ..., :HEAD_DIM].transpose(1, 2).flatten(0, 1)
        slots = torch.arange(first * PAGE, first * PAGE + len(part), device=bench.device)
        encode_rows(part.float() @ rotation_on(HEAD_DIM, 1.0, bench.device), slots, codes)
    table = torch.randperm(pages, device=bench.device).int().view(batch, -1)
    lens = torch.full((batch,), rows, dtype=torch.int32, device=bench.device)
    options = Options(visited=VISITED, dense_below=0, window=64 // bench.shrink or 1, sinks=4)
    q = bench.queries(batch)
    output = torch.empty_like(q)

    def step() -> None:
        attend_rows(q, cache, codes, table, lens, output, most=rows, scale=SCALE, options=options)

    bench.time("paged", "saap", [step], round(batch * KV_HEADS * rows * VISITED), **shape)
