"""Select rows when each key is in two buckets, without visiting a key twice.

Vectors are held once, in the order of their best buckets. A visited bucket is a range, as without
spill. Keys that have it as their second bucket, and whose best bucket is not visited, are added as
single rows.

After SOAR (Sun et al., arXiv 2404.00774), with the second-best bucket in place of its criterion of
orthogonal residuals.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .lists import bucket_of_row, expand_heads, sizes_of, within_share


def spilled_ranges(
    scores: Float[Tensor, "n H nlist"],
    offsets: Int[Tensor, "Hkv nlist_plus_1"],
    second: Int[Tensor, "Hkv rows"],
    positions: Int[Tensor, "Hkv rows"],
    *,
    nprobe: int | None,
    max_tokens: int | None,
    top_p: float | None,
) -> tuple[Int[Tensor, "n H R"], Int[Tensor, "n H R"]]:
    """Do what `bucket_ranges` does for keys that are in two buckets; no row is in two ranges.

    `max_tokens` counts each row once; the last bucket is cut to its rows of the highest positions.
    Reads a rank for every row and query, and synchronises with the host once, for the number of
    single rows.
    """
    heads, nlist = scores.shape[1:]
    sizes, place = offsets.diff(dim=-1), bucket_of_row(offsets, second.shape[1])
    empty = expand_heads((sizes + sizes_of(second, nlist) == 0)[None], heads)
    values, best = scores.masked_fill(empty, -torch.inf).sort(-1, descending=True)
    limit = torch.full(best.shape[:2], nlist if nprobe is None else nprobe, device=best.device)
    if top_p is not None:
        limit = limit.minimum(within_share(values, scores, top_p).sum(-1))
    numbers = torch.arange(nlist, device=best.device)
    rank = torch.empty_like(best).scatter_(-1, best, numbers.expand_as(best))
    per_row = (len(scores), -1, -1)
    rank_best = rank.gather(-1, expand_heads(place[None], heads).expand(per_row))
    rank_second = rank.gather(-1, expand_heads(second[None].long(), heads).expand(per_row))
    rank_row = rank_best.minimum(rank_second)

    whole, left = limit, torch.zeros_like(limit)
    if max_tokens is not None:
        new_rows = torch.zeros_like(best).scatter_add_(-1, rank_row, torch.ones_like(rank_row))
        reached = new_rows.cumsum(-1)
        whole = limit.minimum((reached <= max_tokens).sum(-1))
        taken = torch.nn.functional.pad(reached, (1, 0)).gather(-1, whole[..., None])[..., 0]
        left = (max_tokens - taken) * (whole < limit)
    is_whole = numbers < whole[..., None]
    starts = expand_heads(offsets[None, :, :-1], heads).expand(per_row).gather(-1, best)
    lengths = expand_heads(sizes[None], heads).expand(per_row).gather(-1, best) * is_whole

    # Rows whose best bucket is not visited as a whole: by their second one, or of the cut bucket.
    outside = rank_best >= whole[..., None]
    by_second = outside & (rank_second < whole[..., None])
    of_cut = outside & (rank_row == whole[..., None]) & (left > 0)[..., None]
    newest = expand_heads(positions[None], heads)
    newest = newest - newest.amin(-1, keepdim=True) + 1 if newest.shape[-1] else newest
    priority = newest * of_cut + by_second * (newest.amax() + 1 if newest.numel() else 1)
    n_single = by_second.sum(-1) + of_cut.sum(-1).minimum(left)
    most = int(n_single.max()) if n_single.numel() else 0
    singles = priority.topk(most, dim=-1).indices
    used = torch.arange(most, device=best.device) < n_single[..., None]
    return (
        torch.cat([starts.int(), singles.int()], -1),
        torch.cat([lengths.int(), used.int()], -1),
    )
