"""Routing of one layer: which inverted list a key belongs to, and what each list is worth.

The one place that `saap` and `linear` (the methods) and the KV store share.
"""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from saap.index.cells import CellRouter, cells_of
from saap.index.kmeans import assign
from saap.index.lists import expand_heads
from saap.index.routers import Router

from .trained_index import LayerIndex

# Where the budget is rows, a bucket is worth its mass per row. Predicted masses of small buckets
# are noisy, so for routers that do not know the sizes the size counts by its root: between mass
# and mass per row, better than both. `CellRouter` predicts mass per row: no correction.
SIZE_POWER = 0.5


@dataclass(frozen=True)
class LayerRouting:
    """Partition and router of one layer.

    Keys and queries are de-RoPEd: `k [B, Hkv, T, D]`, `q [B, Hq, D]`. A list is a cell: a bucket,
    or one of the age segments of a bucket where the router tells them apart.
    """

    centroids: Float[Tensor, "Hkv nlist D"]
    router: Router

    @classmethod
    def of(cls, layer: LayerIndex, router: str) -> "LayerRouting":
        """Raises ValueError when the layer has no router of that name."""
        return cls(layer.centroids, layer.router(router))

    @property
    def nlist(self) -> int:
        return self.centroids.shape[1]

    @property
    def n_lists(self) -> int:
        return self.nlist * self.router.n_segments

    @property
    def nbytes(self) -> int:
        """Bytes that one decode step reads to score the lists."""
        return self.router.nbytes

    def assign(self, k_derope: Float[Tensor, "B Hkv T D"]) -> Int[Tensor, "B Hkv T"]:
        """The bucket of each key."""
        return assign(k_derope, self.centroids)

    def lists_of(
        self, buckets: Int[Tensor, "B Hkv T"], age: Int[Tensor, "*B_Hkv_T"]
    ) -> Int[Tensor, "B Hkv T"]:
        """The list of each key from its bucket and its age, the distance to the newest token.

        Lists of a bucket follow each other from old to new.
        """
        if self.router.n_segments == 1:
            return buckets
        return cells_of(buckets, age, self.router.ages.to(age.device))

    def scores(
        self,
        q_derope: Float[Tensor, "B Hq D"],
        sizes: Int[Tensor, "B Hkv n_lists"],
        *,
        share: str = "group",
        per_row: bool = True,
    ) -> Float[Tensor, "B H n_lists"]:
        """Higher is visited first. `H` is Hkv for `share="group"`, else Hq.

        `per_row`: worth by rows visited (for `max_tokens`), else predicted mass (`nprobe`,
        `top_p`).
        """
        mass = self.router.mass(q_derope, sizes)
        if share == "group":
            mass = mass.unflatten(1, (self.centroids.shape[0], -1)).sum(2)
        if not per_row:
            return mass
        rows = expand_heads(sizes.float().clamp(min=1), mass.shape[1])
        return mass / (rows if isinstance(self.router, CellRouter) else rows**SIZE_POWER)
