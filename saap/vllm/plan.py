"""What all layers of a step on a CPU share: how many pages each request visits.

How many pages does not depend on which, so vLLM's schedule of the work is made once for a step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs

from .options import Options
from .rows import to_keep

PAGE = 32
"""Tokens of a page: the least that vLLM's CPU kernels take."""


@dataclass
class Shape:
    """Of the layers of a group: heads of this process, and what the kernel wants to know."""

    heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype
    isa: str


@dataclass
class Plan:
    """The first `requests` of a step decode sparsely. `keep [R]` int32 pages for each, `most`
    their maximum.

    For the kernel each KV head is a request: `seq_lens [R * Hkv]` int32 tokens in its pages,
    `query_start_loc [R * Hkv + 1]` int32, `schedule` its own plan of the work. `rest` is vLLM's
    metadata of the requests behind them, None if there are none.
    """

    requests: int
    keep: Tensor
    most: int
    sink_pages: int
    window_pages: int
    seq_lens: Tensor
    query_start_loc: Tensor
    schedule: Tensor
    rest: object | None = None


def pages_at_ends(options: Options, page: int) -> tuple[int, int]:
    """Pages that hold the sinks, and pages that hold the window wherever the last one ends."""
    return -(-options.sinks // page), -(-options.window // page) + 1


def pages_to_keep(lens: Tensor, options: Options, page: int) -> Tensor:
    """How many pages a request of so many tokens visits, int32 `[R]`."""
    pages = (lens.long() + page - 1) // page
    return to_keep(pages, lens, sum(pages_at_ends(options, page)), options)


def make_plan(lens: Tensor, options: Options, shape: Shape, page: int = PAGE) -> Plan:
    """The plan of requests with `lens [R]` int32 tokens each, the new one counted in."""
    n, heads = len(lens), shape.kv_heads
    keep = pages_to_keep(lens, options, page)
    last_page_free = -lens % page
    seq_lens = (keep * page - last_page_free).int().repeat_interleave(heads)
    starts = torch.arange(n * heads + 1, dtype=torch.int32)
    schedule = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=n * heads, num_heads=shape.heads // heads, num_kv_heads=1, head_dim=shape.dim,
        seq_lens=seq_lens, dtype=shape.dtype, query_start_loc=starts, causal=True,
        sliding_window_size=-1, isa=shape.isa, enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
    )  # fmt: skip
    return Plan(
        n, keep, int(keep.max()), *pages_at_ends(options, page), seq_lens, starts, schedule
    )
