"""Sums over a layer's queries and keys, from which the coordinates of codes are learned.

Nothing is known of single vectors, only two covariances. Keys count in them by how much queries
look towards them.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

RIDGE = 1e-3
"""Of a covariance's mean variance, added to every one."""

MOST_OBSERVED = 2048
"""Tokens whose queries' covariance is taken, the latest ones."""

KEPT = 1 - 1 / MOST_OBSERVED
"""What a token's queries count of what those of the next one count."""

AT_ONCE = 16384
"""Vectors that are held in float64 at once."""

SHARPNESS = 3.0
"""A key that scores a standard deviation more than others with the mean query counts 0.96, one
that scores as much less 0.29."""

LEAST_WEIGHT = 0.25
"""What every key counts at least. Without it five times as much of the attention of single rows
that matter is lost (SmolLM2, 8,192 tokens, `benchmarks/needles.py`)."""


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
            # One sequence's NaN must not keep the others of its batch from being coded.
            part = part.double().nan_to_num(0.0, 0.0, 0.0)
            if toward is None:
                count = part.new_full((n_kv,), part.shape[1])
                sums += cls(count, part.sum(1), part.mT @ part)
            else:
                sums += cls.weighed(part, toward.weights(part))
        return sums

    @classmethod
    def weighed(cls, x: Float[Tensor, "Hkv n D"], weights: Float[Tensor, "Hkv n"]) -> "Sums":
        """Of float64 vectors by their weights."""
        counted = x * weights[..., None]
        return cls(weights.sum(1), counted.sum(1), counted.mT @ x)

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
    """How much keys count, up to 1: the more, the more the mean query looks towards them.

    Keys that score low with the mean query are hardly ever among the best ones of any query, and
    those that are have to be told from one another. So coordinates are such as serve these.
    """

    query: Float[Tensor, "Hkv D"]  # the mean one
    score: Float[Tensor, " Hkv"]  # of keys with it, on average
    spread: Float[Tensor, " Hkv"]  # of these scores
    least: float = LEAST_WEIGHT

    @classmethod
    def of(cls, queries: Sums, keys: Sums, least: float = LEAST_WEIGHT) -> "Toward":
        query, mean = queries.mean, keys.mean
        score = (query * mean).sum(-1)
        square = torch.einsum("hi,hij,hj->h", query, keys.about_mean, query)
        # Where all score alike but for rounding, all count alike.
        rounding = 10 * keys.rounding * (query * query).sum(-1)
        spread = torch.where(square > rounding, square, torch.inf).sqrt()
        return cls(query, score, spread, least)

    def weights(self, k: Float[Tensor, "Hkv n D"]) -> Float[Tensor, "Hkv n"]:
        score = (k @ self.query[..., None])[..., 0] - self.score[:, None]
        toward = torch.sigmoid(SHARPNESS * score / self.spread[:, None])
        return self.least + (1 - self.least) * toward


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
    def of(
        cls,
        queries: Float[Tensor, "Hkv n D"],
        keys: Float[Tensor, "Hkv m D"],
        least: float = LEAST_WEIGHT,
    ) -> "Moments":
        """Of these, keys counting by how much the queries look `Toward` them, but at least so
        much."""
        return cls.of_sums(*_sums_of(queries, keys, least))


def _sums_of(
    queries: Float[Tensor, "Hkv n D"],
    keys: Float[Tensor, "Hkv m D"],
    least: float = LEAST_WEIGHT,
) -> tuple[Sums, Sums]:
    own = Sums.of(queries)
    return own, Sums.of(keys, Toward.of(own, Sums.of(keys), least))


class MomentSums:
    """Sums from which `Moments` are made, over texts that need not be held at once."""

    def __init__(self):
        self.sums: tuple[Sums, Sums] | None = None

    def add(self, q: Float[Tensor, "Hq n D"], k: Float[Tensor, "Hkv m D"]) -> None:
        """Add queries and keys of a text, both as attention sees them.

        Keys count by how much the queries of this text look `Toward` them.
        """
        own = _sums_of(q.unflatten(0, (len(k), -1)).flatten(1, 2), k)
        if self.sums is not None:
            own = tuple(a + b for a, b in zip(self.sums, own, strict=True))
        self.sums = own

    def moments(self) -> Moments:
        return Moments.of_sums(*self.sums)


class RecentQueries:
    """Sums over a sequence's queries, those of about the last `MOST_OBSERVED` tokens.

    Over the query heads of each KV head; older tokens count less and less. What they are depends
    on the tokens alone, not on when somebody asked.
    """

    WAITING = 64  # single tokens that are added together

    def __init__(self, n_kv: int, sums: Sums | None = None):
        self.n_kv, self._sums = n_kv, sums
        self._waiting: list[Tensor] = []

    def copy(self) -> "RecentQueries":
        copied = RecentQueries(self.n_kv, self._sums)
        copied._waiting = list(self._waiting)
        return copied

    def begin(self, q: Float[Tensor, "Hq n D"]) -> None:
        """The first queries, or more of them before anything was learned: the latest tokens, all
        of which count alike."""
        own = self._of(q[:, -MOST_OBSERVED:])
        if self._sums is not None:
            held = float(self._sums.count.max()) / (len(q) // self.n_kv)
            room = MOST_OBSERVED - min(q.shape[1], MOST_OBSERVED)
            own = self._sums * min(1.0, room / held) + own if held else own
        self._sums = own

    def add(self, q: Float[Tensor, "Hq n D"]) -> None:
        """Queries of n tokens, or of as many keys that stand in for them."""
        if q.shape[1] == 1:
            self._waiting.append(q.clone())
            if len(self._waiting) == self.WAITING:
                self._add_waiting()
            return
        self._add_waiting()
        latest = q[:, -MOST_OBSERVED:]
        n = latest.shape[1]
        own = self._of(latest)
        self._sums = self._aged(n, own) if n < MOST_OBSERVED else own

    def _add_waiting(self) -> None:
        self._sums, self._waiting = self.sums, []

    def _of(self, q: Float[Tensor, "Hq n D"]) -> Sums:
        return Sums.of(self._by_kv_head(q))

    def _by_kv_head(self, q: Float[Tensor, "Hq n D"]) -> Float[Tensor, "Hkv m D"]:
        return q.unflatten(0, (self.n_kv, -1)).flatten(1, 2)

    def _aged(self, tokens: int, own: Sums) -> Sums:
        """What was there so many tokens ago, and new ones."""
        return own if self._sums is None else self._sums * KEPT**tokens + own

    @property
    def sums(self) -> Sums | None:
        """None before the first queries."""
        n = len(self._waiting)
        if not n:
            return self._sums
        waited = torch.cat(self._waiting, 1).double().nan_to_num(0.0, 0.0, 0.0)
        # Each by its age, as if it had come alone.
        ages = torch.arange(n - 1, -1, -1, dtype=waited.dtype, device=waited.device)
        weights = (KEPT**ages).repeat(len(waited) // self.n_kv).expand(self.n_kv, -1)
        return self._aged(n, Sums.weighed(self._by_kv_head(waited), weights))


def regular(matrix: Float[Tensor, "H D D"]) -> Float[Tensor, "H D D"]:
    size = matrix.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-20)
    one = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return matrix + RIDGE * size[:, None, None] * one
