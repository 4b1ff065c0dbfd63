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

BLOCK = 8
"""Coordinates that a rotation mixes, so that each has a share of the large ones among them."""

RIDGE = 1e-3

MOST_OBSERVED = 2048
"""Tokens whose queries' covariance is taken, the latest ones."""

AT_ONCE = 16384
"""Keys that are held in float64 at once."""


@dataclass(frozen=True)
class Moments:
    """Second moments of a layer's vectors, float64 `[Hkv, D, D]`, and the mean key `[Hkv, D]`.

    `queries` about zero, over the query heads of a KV head; `keys` about their mean.
    """

    queries: Float[Tensor, "Hkv D D"]
    keys: Float[Tensor, "Hkv D D"]
    mean: Float[Tensor, "Hkv D"]

    @classmethod
    def of(cls, queries: Float[Tensor, "Hkv n D"], keys: Float[Tensor, "Hkv m D"]) -> "Moments":
        sums = MomentSums()
        sums.add_queries(queries)
        sums.add_keys(keys)
        return sums.moments()


class MomentSums:
    """Sums from which `Moments` are made, over pieces of a text that need not be held at once."""

    def __init__(self):
        self.n_queries = self.n_keys = 0
        self.queries = self.keys = self.sum = 0.0

    def add(self, q: Float[Tensor, "Hq n D"], k: Float[Tensor, "Hkv n D"]) -> None:
        """Add queries and keys of some tokens, both as attention sees them."""
        self.add_queries(q.unflatten(0, (len(k), -1)).flatten(1, 2))
        self.add_keys(k)

    def add_queries(self, q: Float[Tensor, "Hkv n D"]) -> None:
        """Queries of all heads of each KV head."""
        q = q.double()
        self.n_queries += q.shape[1]
        self.queries = self.queries + q.mT @ q

    def add_keys(self, k: Float[Tensor, "Hkv n D"]) -> None:
        for part in k.split(AT_ONCE, 1):
            part = part.double()
            self.n_keys += part.shape[1]
            self.keys = self.keys + part.mT @ part
            self.sum = self.sum + part.sum(1)

    def moments(self) -> Moments:
        mean = self.sum / self.n_keys
        keys = self.keys / self.n_keys - mean[..., None] * mean[:, None]
        return Moments(self.queries / self.n_queries, keys, mean.float())


class RecentQueries:
    """The second moment of a sequence's queries, those of about the last `MOST_OBSERVED` tokens.

    Sums over the query heads of each KV head; older tokens count less and less.
    """

    WAITING = 64  # single tokens that are added together

    def __init__(self, n_kv: int, sums: Tensor | float = 0.0, count: float = 0.0):
        self.n_kv, self.sums, self.count = n_kv, sums, count
        self._waiting: list[Tensor] = []

    def copy(self) -> "RecentQueries":
        self._add_waiting()
        return RecentQueries(self.n_kv, self.sums, self.count)

    def add(self, q: Float[Tensor, "Hq n D"]) -> None:
        """Queries of n tokens, or of as many keys that stand in for them."""
        if q.shape[1] == 1:
            self._waiting.append(q.clone())
            if len(self._waiting) == self.WAITING:
                self._add_waiting()
            return
        self._add_waiting()
        self._add(q[:, -MOST_OBSERVED:])

    def _add_waiting(self) -> None:
        if self._waiting:
            waited, self._waiting = self._waiting, []
            self._add(torch.cat(waited, 1))

    def _add(self, q: Float[Tensor, "Hq n D"]) -> None:
        left = (1 - 1 / MOST_OBSERVED) ** q.shape[1] if q.shape[1] < MOST_OBSERVED else 0.0
        own = q.unflatten(0, (self.n_kv, -1)).flatten(1, 2).double()
        self.sums = left * self.sums + own.mT @ own
        self.count = left * self.count + own.shape[1]

    def without_keys(self) -> MomentSums:
        """Sums with these queries, which keys are still to be added to."""
        self._add_waiting()
        sums = MomentSums()
        sums.queries, sums.n_queries = self.sums, self.count
        return sums

    def state(self) -> tuple[Float[Tensor, "Hkv D D"], float]:
        self._add_waiting()
        return self.sums.float(), self.count


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

    def left_out(self, q: Float[Tensor, "n Hq D"]) -> Float[Tensor, "n Hq"]:
        """What the mean adds to a query's inner product with every key."""
        own = q.float().unflatten(1, (self.mean.shape[1], -1))
        return (own @ self.mean[..., None]).flatten(1)

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
    keys, queries = (_regular(m) for m in (moments.keys, moments.queries))
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


def _regular(matrix: Float[Tensor, "H D D"]) -> Float[Tensor, "H D D"]:
    size = matrix.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-20)
    return matrix + RIDGE * size[:, None, None] * torch.eye(matrix.shape[-1]).to(matrix)


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
