"""Cells: buckets cut into time segments.

The rows of a bucket stay in time order, so each cell of a bucket is one range of rows. A cell says
what its keys are like (the bucket) and about where in the context they stand (the segment), and
both together say how RoPE rotates them.
"""

import torch
from jaxtyping import Int
from torch import Tensor


def segments_of(
    place: Int[Tensor, "*#any"], n: int | Int[Tensor, "*#any"], n_segments: int
) -> Int[Tensor, "*#any"]:
    """The segment of each key, of segments that hold equally many keys.

    `place` is the place of the key among n keys in time order, 0 the oldest.
    """
    return torch.div(place.long() * n_segments, n, rounding_mode="floor")


def cells_of(
    buckets: Int[Tensor, "*#any"],
    place: Int[Tensor, "*#any"],
    n: int | Int[Tensor, "*#any"],
    n_segments: int,
) -> Int[Tensor, "*#any"]:
    """The number of the cell of each key: bucket after bucket, from old to new within a bucket.

    Sorting by them keeps the rows of a bucket together and in time order.
    """
    return buckets.long() * n_segments + segments_of(place, n, n_segments)
