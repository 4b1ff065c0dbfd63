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

ALIKE = 0.75
"""The power of the variance of a query's scores that its weight is divided by."""

SHARPNESS = 3.0
"""A key that scores a standard deviation more than others with the mean query counts 0.95, one
that scores as much less 0.05."""


class Sums:
    """Of vectors that each count by a weight: float64, of each KV head for itself.

    `count [Hkv]`: of the weights; `total [Hkv, D]`: of the vectors; `products [Hkv, D, D]`: of
    their products with themselves.
    """

    def __init__(self, count: Tensor, total: Tensor, products: Tensor):
        self.count, self.total, self.products = count, total, products

    @classmethod
    def zeros(cls, n_kv: int, dim: int, device: torch.device | None = None) -> "Sums":
        shapes = (n_kv,), (n_kv, dim), (n_kv, dim, dim)
        return cls(*(torch.zeros(s, dtype=torch.float64, device=device) for s in shapes))

    @classmethod
    def of(cls, x: Float[Tensor, "Hkv n D"], toward: "Toward | None" = None) -> "Sums":
        """toward: by which they count; None: all alike."""
        n_kv, _, dim = x.shape
        sums = cls.zeros(n_kv, dim, x.device)
        for part in x.split(AT_ONCE, 1):
            part = part.double()
            weights = torch.ones_like(part[..., 0]) if toward is None else toward.weights(part)
            weighed = part * weights[..., None]
            own = weights.sum(1), weighed.sum(1), weighed.mT @ part
            sums += cls(*own)
        return sums

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.count, self.total, self.products

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(*(a + b for a, b in zip(self.parts, other.parts, strict=True)))

    def __mul__(self, share: float) -> "Sums":
        return Sums(*(share * part for part in self.parts))

    @property
    def mean(self) -> Float[Tensor, "Hkv D"]:
        return self.total / self.count[:, None]

    @property
    def about_zero(self) -> Float[Tensor, "Hkv D D"]:
        return self.products / self.count[:, None, None]

    @property
    def about_mean(self) -> Float[Tensor, "Hkv D D"]:
        """Positive definite, also where vectors are equal but for rounding."""
        least = torch.diag_embed(self.rounding[:, None].expand_as(self.total))
        return self.about_zero - self.mean[..., None] * self.mean[:, None] + least

    @property
    def rounding(self) -> Float[Tensor, " Hkv"]:
        """More than what rounding may add to a variance."""
        return 1e-12 * self.about_zero.diagonal(dim1=-2, dim2=-1).mean(-1)


@dataclass(frozen=True)
class Toward:
    """How much keys count, from 0 to 1: the more, the more the mean query looks towards them.

    Keys that score low with the mean query are hardly ever among the best ones of any query, and
    those that are have to be told from one another. So coordinates are such as serve these.
    """

    query: Float[Tensor, "Hkv D"]  # the mean one
    score: Float[Tensor, " Hkv"]  # of keys with it, on average
    spread: Float[Tensor, " Hkv"]  # of these scores

    @classmethod
    def of(cls, queries: Sums, keys: Sums) -> "Toward":
        query, mean = queries.mean, keys.mean
        score = (query * mean).sum(-1)
        square = torch.einsum("hi,hij,hj->h", query, keys.about_mean, query)
        # Where all score alike but for rounding, all count alike.
        least = 10 * keys.rounding * (query * query).sum(-1)
        return cls(query, score, torch.where(square > least, square, torch.inf).sqrt())

    def weights(self, k: Float[Tensor, "Hkv n D"]) -> Float[Tensor, "Hkv n"]:
        score = (k @ self.query[..., None])[..., 0] - self.score[:, None]
        return torch.sigmoid(SHARPNESS * score / self.spread[:, None])


@dataclass(frozen=True)
class Moments:
    """Second moments of a layer's vectors, float64 `[Hkv, D, D]`, and the mean key `[Hkv, D]`.

    `queries` about zero, over the query heads of a KV head; `keys` about their mean.
    """

    queries: Float[Tensor, "Hkv D D"]
    keys: Float[Tensor, "Hkv D D"]
    mean: Float[Tensor, "Hkv D"]

    @classmethod
    def of_sums(cls, queries: Sums, keys: Sums) -> "Moments":
        return cls(queries.about_zero, keys.about_mean, keys.mean.float())

    @classmethod
    def of(cls, queries: Float[Tensor, "Hkv n D"], keys: Float[Tensor, "Hkv m D"]) -> "Moments":
        """Of these: queries `alike`, keys counting by how much the queries look `Toward` them."""
        return cls.of_sums(*_sums_of(queries, keys))


def alike(q: Float[Tensor, "Hkv n D"], keys: Float[Tensor, "Hkv D D"]) -> Float[Tensor, "Hkv n D"]:
    """Queries times such factors that they count more alike.

    Whether an error changes which rows are a query's best depends on how far its scores of keys,
    whose covariance is given, are apart. One query head's may be ten times as far apart as
    another's of the same KV head, and would count for a hundred of it.
    """
    q = q.double()
    square = ((q @ _regular(keys)) * q).sum(-1, keepdim=True)
    return torch.where(square > 0, q * square.clamp(min=1e-300) ** (-ALIKE / 2), 0)


def _sums_of(queries: Float[Tensor, "Hkv n D"], keys: Float[Tensor, "Hkv m D"]):
    every = Sums.of(keys)
    own = Sums.of(alike(queries, every.about_mean))
    return own, Sums.of(keys, Toward.of(own, every))


class MomentSums:
    """Sums from which `Moments` are made, over texts that need not be held at once."""

    def __init__(self):
        self.sums: tuple[Sums, Sums] | None = None

    def add(self, q: Float[Tensor, "Hq n D"], k: Float[Tensor, "Hkv m D"]) -> None:
        """Add queries and keys of a text, both as attention sees them.

        Queries `alike` to this text's keys, and these as its queries look `Toward` them.
        """
        own = _sums_of(q.unflatten(0, (len(k), -1)).flatten(1, 2), k)
        if self.sums is not None:
            own = tuple(a + b for a, b in zip(self.sums, own, strict=True))
        self.sums = own

    def moments(self) -> Moments:
        return Moments.of_sums(*self.sums)


class RecentQueries:
    """Sums over a sequence's queries, `alike`, those of about the last `MOST_OBSERVED` tokens.

    Over the query heads of each KV head; older tokens count less and less. `keys`: the covariance
    of the sequence's keys, float64 `[Hkv, D, D]`, which may change as it grows.
    """

    WAITING = 64  # single tokens that are added together

    def __init__(self, keys: Float[Tensor, "Hkv D D"], sums: Sums | None = None):
        self._keys, self._sums = keys, sums
        self._waiting: list[Tensor] = []

    def copy(self) -> "RecentQueries":
        return RecentQueries(self.keys, self.sums)

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
        queries = q.unflatten(0, (len(self._keys), -1)).flatten(1, 2)
        own = Sums.of(alike(queries, self._keys))
        left = (1 - 1 / MOST_OBSERVED) ** q.shape[1] if q.shape[1] < MOST_OBSERVED else 0.0
        self._sums = own if self._sums is None else self._sums * left + own

    @property
    def keys(self) -> Float[Tensor, "Hkv D D"]:
        return self._keys

    @keys.setter
    def keys(self, covariance: Float[Tensor, "Hkv D D"]) -> None:
        self._add_waiting()  # their scores were of the keys before
        self._keys = covariance

    @property
    def sums(self) -> Sums:
        self._add_waiting()
        return self._sums


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
