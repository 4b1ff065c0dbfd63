"""Sums over rows, in clusters of near keys, from which their means and covariances follow."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

N_CLUSTERS = 32
SAMPLE = 2048
"""Rows that clusters are found among."""

N_ITER = 5


@dataclass(frozen=True)
class Clusters:
    """Which rows lie near each other, for the KV heads of a sequence.

    `origin [Hkv, 1, 2 D]`: a mean row, key beside value, from which all are measured, so that
    little cancels. `centroids [Hkv, K, D]`: keys less this. `limit [Hkv, 1]`: rows whose keys are
    farther away are not counted. A query that meets one either visits its row or hardly looks at
    it, while a single one can make the variance of all scores many times what it is for the others
    (some models have such keys at separators).
    """

    origin: Float[Tensor, "Hkv 1 twice_D"]
    centroids: Float[Tensor, "Hkv K D"]
    limit: Float[Tensor, "Hkv 1"]

    FAR = 4.0
    """Times the median distance of keys from their mean."""

    @classmethod
    def of(cls, sample: Float[Tensor, "Hkv n twice_D"]) -> "Clusters":
        """k-means of the sample's keys, which starts at rows that are evenly spaced."""
        n, dim = sample.shape[1], sample.shape[2] // 2
        origin = sample.mean(1, keepdim=True)
        keys = (sample - origin)[..., :dim]
        distance = keys.norm(dim=2)
        middle = distance.median(1, keepdim=True).values
        limit = torch.where(middle > 0, cls.FAR * middle, torch.inf)
        near = (distance <= limit)[..., None]
        place = torch.linspace(0, n - 1, N_CLUSTERS, dtype=torch.float32, device=sample.device)
        first = place.round().long()
        centroids = keys[:, first]
        for _ in range(N_ITER):
            own = membership(keys, centroids) * near
            count = own.sum(1)[..., None]
            centroids = torch.where(count > 0, own.mT @ keys / count.clamp(min=1), centroids)
        return cls(origin, centroids, limit)


def membership(
    keys: Float[Tensor, "Hkv n D"], centroids: Float[Tensor, "Hkv K D"]
) -> Float[Tensor, "Hkv n K"]:
    """1 for the nearest centroid of each key; equally near ones share it."""
    half = centroids.square().sum(-1)[:, None] / 2
    score = torch.baddbmm(half, keys, centroids.mT, beta=-1)
    own = (score >= score.amax(-1, keepdim=True)).to(keys.dtype)
    return own / own.sum(-1, keepdim=True)


class RowSums:
    """Sums over n rows `[Hkv, n, 2 D]`, key beside value, less the origin of their clusters.

    `counts [Hkv, K, 1]`, `sums [Hkv, K, 2 D]` and `squares [Hkv, K, 1]`, of the lengths of keys,
    are of each cluster, `products [Hkv, D, 2 D]` of all; float64.
    """

    ADDED = ("counts", "sums", "squares", "products")
    NAMES = ("origin", "centroids", "limit", *ADDED)

    def __init__(self, clusters: Clusters):
        self.clusters, self.n = clusters, 0
        n_kv, number, dim = clusters.centroids.shape

        def zeros(*shape: int) -> Tensor:
            options = {"dtype": torch.float64, "device": clusters.origin.device}
            return torch.zeros(n_kv, *shape, **options)

        self.counts, self.squares = zeros(number, 1), zeros(number, 1)
        self.sums, self.products = zeros(number, 2 * dim), zeros(dim, 2 * dim)

    @classmethod
    def restored(cls, n: int, tensors: dict[str, Tensor]) -> "RowSums":
        own = cls(Clusters(*(tensors[name] for name in cls.NAMES[:3])))
        own.n = n
        for name in cls.ADDED:
            setattr(own, name, tensors[name])
        return own

    def tensors(self) -> dict[str, Tensor]:
        return vars(self.clusters) | {name: getattr(self, name) for name in self.ADDED}

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors().values())

    def copy(self) -> "RowSums":
        return RowSums.restored(self.n, {n: t.clone() for n, t in self.tensors().items()})

    def add(self, rows: Float[Tensor, "Hkv n twice_D"]) -> None:
        clusters, dim = self.clusters, rows.shape[2] // 2
        rows = rows - clusters.origin
        square = rows[..., :dim].square().sum(2, keepdim=True)
        near = square <= clusters.limit[..., None] ** 2
        own = membership(rows[..., :dim], clusters.centroids) * near
        rows = torch.where(near, rows, 0.0)
        self.n += rows.shape[1]
        self.counts += own.sum(1, dtype=torch.float64)[..., None]
        self.squares += own.mT @ torch.where(near, square, 0.0)
        self.sums += own.mT @ rows
        self.products += rows[..., :dim].mT @ rows

    def moments(self) -> dict[str, Tensor]:
        """All of `Moments` but the number of rows, without the dimension of sequences."""
        dim = self.products.shape[1]
        kept = self.counts.sum(1, keepdim=True).clamp(min=1)
        share, means = self.counts / kept, self.sums / self.counts.clamp(min=1)
        mean = (share * means).sum(1, keepdim=True)
        between = (share * means)[..., :dim].mT @ means
        square = (self.squares / self.counts.clamp(min=1)).clamp(min=0)
        within = (square - means[..., :dim].square().sum(2, keepdim=True)).clamp(min=0)
        usual = (share * within).sum(1, keepdim=True)
        factor = torch.where(usual > 0, within / usual, 1.0)
        off = torch.where(self.counts > 0, means - mean, 0.0)
        return {
            "spread": self.products / kept - between,
            "means": (self.clusters.origin + mean)[:, 0],
            "keys": off[..., :dim].mT,
            "values": off[..., dim:],
            "sizes": torch.cat([share, factor], 2).mT,
        }
