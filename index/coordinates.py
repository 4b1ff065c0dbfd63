"""Coordinates in which what a score depends on comes first: how keys are coded.

A score is a query times a key. Both have directions in which they vary much and others in which
they hardly do, and not the same ones. The *balanced* coordinates of a pair of covariances (Moore,
IEEE TAC 1981, for linear systems) are those in which both are the same diagonal matrix: the
variance of a key's coordinate and of a query's are equal, and their product, which is what an
error in that coordinate costs, falls from one to the next as fast as any linear map can make it.
Bits are then spent on the first ones. Nothing about single keys is learned, but RoPE turns later
keys and queries in other directions: a context that grows has to be learned from again.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .moments import Moments, regular

BLOCK = 8
"""Coordinates that a rotation mixes, so that each has a share of the large ones among them."""


@dataclass(frozen=True)
class Coordinates:
    """A linear map of keys and its inverse for queries, for B sequences or for all (`B = 1`).

    `of_keys, of_queries [B, Hkv, P, D]`: a key less the mean `[B, Hkv, D]` has coordinates
    `of_keys @ (k - mean)` of unit variance, a query `of_queries @ q`, and the inner product is
    that of the vectors, but for what the mean adds to every key alike. `importance [B, Hkv, P]`:
    what an error in a coordinate costs. P is D, or more where others are `padded`.
    """

    of_keys: Float[Tensor, "B Hkv P D"]
    of_queries: Float[Tensor, "B Hkv P D"]
    mean: Float[Tensor, "B Hkv D"]
    importance: Float[Tensor, "B Hkv P"]

    def keys(self, k: Float[Tensor, "B Hkv n D"]) -> Float[Tensor, "B Hkv n P"]:
        return (k.float() - self.mean[:, :, None]) @ self.of_keys.mT

    def less_mean(
        self, scores: Float[Tensor, "n Hq"], q: Float[Tensor, "n Hq D"], sm_scale: float
    ) -> Float[Tensor, "n Hq"]:
        """Scores of queries without what the mean adds to those with every key."""
        n_kv, dim = self.mean.shape[1:]
        queries = q.float().reshape(len(q) * n_kv, -1, dim)
        mean = self.mean.expand(len(q), -1, -1).reshape(-1, dim, 1)
        own = scores.reshape(*queries.shape[:2], 1)
        # One kernel on a GPU, at each step of each layer.
        return torch.baddbmm(own, queries, mean, alpha=-sm_scale).view_as(scores)

    def moments_of_queries(self) -> Float[Tensor, "B Hkv D D"]:
        """Second moments of the queries that they came from; coordinates hardly correlate."""
        return self.of_keys.mT @ (self.importance[..., None] * self.of_keys)

    def padded(self, count: int) -> "Coordinates":
        """With as many more coordinates, which are 0, as make so many."""

        def of(t: Tensor) -> Tensor:
            out = t.new_zeros(*t.shape[:2], count, *t.shape[3:])
            out[:, :, : t.shape[2]] = t
            return out

        return Coordinates(of(self.of_keys), of(self.of_queries), self.mean, of(self.importance))

    def tensors(self) -> dict[str, Tensor]:
        names = ("of_keys", "of_queries", "mean", "importance")
        return {name: getattr(self, name) for name in names}

    def of_sequence(self, b: int) -> "Coordinates":
        """Those of one sequence."""
        if len(self.mean) == 1:
            return self
        return Coordinates(**{name: t[b : b + 1] for name, t in self.tensors().items()})

    @classmethod
    def stacked(cls, each: "list[Coordinates]") -> "Coordinates":
        if len(each) == 1:  # no second copy
            return each[0]
        parts = [own.tensors() for own in each]
        return cls(**{name: torch.cat([p[name] for p in parts]) for name in parts[0]})


def balanced(moments: Moments) -> Coordinates:
    """Coordinates in which keys and queries vary alike, the largest first.

    Within blocks of eight they are mixed by a Hadamard rotation, since a quantizer likes
    coordinates that are alike.
    """
    dim = moments.keys.shape[-1]
    keys, queries = (regular(m) for m in (moments.keys, moments.queries))
    root = torch.linalg.cholesky(keys)
    values, vectors = torch.linalg.eigh(root.mT @ queries @ root)
    spread = values.flip(-1).clamp(min=1e-30).sqrt()  # of keys and of queries, in each coordinate
    vectors = vectors.flip(-1)
    # y = diag(spread)^(1/2) vectors' root^-1 k has covariance diag(spread), as queries have.
    forward = (
        spread.sqrt()[..., None] * torch.linalg.solve_triangular(root.mT, vectors, upper=True).mT
    )
    backward = (root @ vectors * spread.rsqrt()[..., None, :]).mT
    mix = _block_rotation(dim).to(forward)
    forward, backward = mix @ forward, mix @ backward
    variance = (mix**2 @ spread[..., None])[..., 0]
    deviation = variance.sqrt()
    of_keys, of_queries = forward / deviation[..., None], backward * deviation[..., None]
    parts = of_keys.float(), of_queries.float(), moments.mean, (variance**2).float()
    return Coordinates(*(part[None] for part in parts))


def _block_rotation(dim: int) -> Float[Tensor, "D D"]:
    blocks, left = [], dim
    while left:
        size = BLOCK
        while size > left:
            size //= 2
        matrix = torch.ones(1, 1, dtype=torch.float64)
        while len(matrix) < size:
            top = torch.cat([matrix, matrix], 1)
            matrix = torch.cat([top, torch.cat([matrix, -matrix], 1)]) / 2**0.5
        blocks.append(matrix)
        left -= size
    return torch.block_diag(*blocks)
