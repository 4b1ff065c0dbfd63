"""Cells: buckets cut into time segments.

The rows of a bucket stay in time order, so a bucket cut where time passes a bound is still a few
ranges of rows. A cell knows what its keys say (the bucket) and about when they stood (the
segment), which together tell what RoPE makes of them.
"""

import torch
from jaxtyping import Int
from torch import Tensor


def segments_of(
    place: Int[Tensor, "*any"], n: int | Int[Tensor, "*any"], n_segments: int
) -> Int[Tensor, "*any"]:
    """The segment of the key at `place` (0 the oldest) of n keys in time order; equally many in
    each."""
    return torch.div(place.long() * n_segments, n, rounding_mode="floor")


def cells_of(
    buckets: Int[Tensor, "*any"],
    place: Int[Tensor, "*any"],
    n: int | Int[Tensor, "*any"],
    n_segments: int,
) -> Int[Tensor, "*any"]:
    """Cell numbers, bucket after bucket, within a bucket from old to new.

    Sorting by them keeps the rows of a bucket together and in time order.
    """
    return buckets.long() * n_segments + segments_of(place, n, n_segments)


def segment_centers(
    n: int | Int[Tensor, " B"], n_segments: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Mean place of the keys of each segment, float32 `[S]`, or `[B, S]` for n `[B]`."""
    n = torch.as_tensor(n, device=device)[..., None]
    return (torch.arange(n_segments, device=device) + 0.5) * n / n_segments - 0.5
