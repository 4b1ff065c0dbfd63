"""Cells: buckets cut where their keys pass an age, and the router that scores them.

Attention looks at what a key says and at how far away it stands. De-RoPEd keys know only the
first, so a partition of them cannot serve a head whose far attention depends on distance. The rows
of a bucket stay in time order, so a bucket cut at ages is still a few ranges: cells.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .lists import expand_heads
from .routers import Router


def segment_ages(n_segments: int, window: int, context: int) -> Int[Tensor, " S_minus_1"]:
    """Ages (distances from the newest token) at which a key passes into the next older segment.

    Evenly spaced in the logarithm between `window`, where the middle begins, and `context`.
    """
    if n_segments < 1:
        raise ValueError(f"n_segments={n_segments}: accepted are 1 and more")
    steps = torch.arange(1, n_segments, dtype=torch.float64) / n_segments
    ratio = max(context, 2 * window) / window
    return (window * ratio**steps).round().to(torch.int32)


def segments_of(age: Int[Tensor, "*any"], ages: Int[Tensor, " S_minus_1"]) -> Int[Tensor, "*any"]:
    """The segment of a key of that age, int64; 0 is the oldest, so segments follow time."""
    return len(ages) - torch.bucketize(age, ages.to(age.dtype), right=True)


def cells_of(
    buckets: Int[Tensor, "*any"], age: Int[Tensor, "*any"], ages: Int[Tensor, " S_minus_1"]
) -> Int[Tensor, "*any"]:
    """Cell numbers, bucket after bucket, within a bucket from old to new.

    Sorting by them keeps the rows of a bucket together and in time order.
    """
    return buckets * (len(ages) + 1) + segments_of(age, ages)


class CellRouter(Router):
    """Predicts the attention weight that a key has on average in each cell.

    A two-layer network as in `MLPRouter` gives `f_b` for each bucket, `o` for all that lies
    outside the middle and `g_s` for each segment; a cell of n keys is then predicted to hold

        n_bs exp(f_b + g_s) / (exp(o) + sum over cells of n exp(f + g))

    of the attention. What was fitted is weight a key, so it holds for a context in which buckets
    have other sizes than in training. Shapes as in `MLPRouter`, with `w2 [Hq, nlist + 1 + S,
    hidden]` and `ages [S - 1]` int32, S segments.

    Source: the classifier is that of Saap, arXiv 2502.08246, section 4.2; segments are ours.
    """

    def __init__(self, mean, scale, w1, b1, w2, b2, ages):
        self.mean, self.scale = mean, scale
        self.w1, self.b1, self.w2, self.b2 = w1, b1, w2, b2
        self.ages = ages
        self.n_segments = len(ages) + 1
        self.n_heads, self.nlist = w2.shape[0], w2.shape[1] - 1 - self.n_segments

    def logits(
        self, q: Float[Tensor, "B Hq D"]
    ) -> tuple[Float[Tensor, "B Hq nlist"], Float[Tensor, "B Hq 1"], Float[Tensor, "B Hq S"]]:
        """`f, o, g`."""
        x = ((q.float() - self.mean) * self.scale).transpose(0, 1)
        hidden = torch.nn.functional.silu(torch.baddbmm(self.b1[:, None], x, self.w1.mT))
        out = torch.baddbmm(self.b2[:, None], hidden, self.w2.mT).transpose(0, 1)
        return out.split([self.nlist, 1, self.n_segments], -1)

    def mass(self, q, sizes=None):
        """Predicted mass of each cell `[B, Hq, nlist * S]` that holds `sizes [B, Hkv, nlist * S]`
        keys."""
        f, o, g = self.logits(q)
        sizes = expand_heads(sizes, q.shape[1]).unflatten(-1, (self.nlist, self.n_segments))
        scores = f[..., None] + g[..., None, :] + sizes.float().log()
        return torch.cat([scores.flatten(-2), o], -1).softmax(-1)[..., :-1]

    def tensors(self):
        return {
            "mean": self.mean,
            "scale": self.scale,
            "w1": self.w1,
            "b1": self.b1,
            "w2": self.w2,
            "b2": self.b2,
            "ages": self.ages,
        }
