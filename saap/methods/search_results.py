"""Merge what a vector search returned for each query head into the rows to visit."""

import torch
from jaxtyping import Int
from torch import Tensor


def merge_results(
    found: list[tuple[Tensor, Tensor]], group: int, n_middle: int, k: int, share: str
) -> Int[Tensor, "n H k"]:
    """`k` rows for each query from the `scores, ids [n * G, k']` found for each KV head.

    Ids of -1 are no result. For `share="group"` a row counts by the highest score that any head of
    the group found for it, relative to that head's best. Where fewer than k rows were found, the
    newest of the others fill the budget.
    """
    scores = torch.stack([s for s, _ in found], 1).unflatten(0, (-1, group)).transpose(1, 2)
    ids = torch.stack([i for _, i in found], 1).unflatten(0, (-1, group)).transpose(1, 2)
    scores = scores - scores.amax(-1, keepdim=True)
    if share == "group":
        scores, ids = scores.flatten(2), ids.flatten(2)
    else:
        scores, ids = (t.flatten(1, 2) for t in (scores, ids))
    # Found scores are at most 0; rows that were not found rank below all of them, newest first.
    scores = scores.masked_fill(ids < 0, -torch.inf)
    lowest = torch.finfo(torch.float32).min
    age = torch.arange(n_middle, 0, -1, dtype=torch.float32, device=ids.device) / n_middle
    ranked = (lowest * 0.5 * (1 + age)).expand(*ids.shape[:2], -1).contiguous()
    ranked.scatter_reduce_(-1, ids.clamp(min=0), scores, "amax")
    return ranked.topk(k, dim=-1).indices
