"""Routing of one layer: which inverted list a key belongs to, and what each list is worth.

The one place that `saap` and `linear` (the methods) and the KV store share.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saap.index.kmeans import assign
from saap.index.lists import expand_heads
from saap.index.routers import Router

from .trained_index import LayerIndex

# Where the budget is rows, a bucket is worth its mass per row. Predicted masses of small buckets
# are noisy, so the size counts by its root: between mass and mass per row, better than both.
SIZE_POWER = 0.5


@dataclass(frozen=True)
class LayerRouting:
    """Partition and router of one layer.

    Keys and queries are de-RoPEd: `k [B, Hkv, T, D]`, `q [B, Hq, D]`.
    """

    centroids: Float[Tensor, "Hkv nlist D"]
    router: Router

    @classmethod
    def of(cls, layer: LayerIndex, router: str) -> "LayerRouting":
        """Raises ValueError when the layer has no router of that name."""
        return cls(layer.centroids, layer.router(router))

    @property
    def n_lists(self) -> int:
        return self.centroids.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that one decode step reads to score the lists."""
        return self.router.nbytes

    def assign(self, k_derope: Float[Tensor, "B Hkv T D"]) -> Int[Tensor, "B Hkv T"]:
        return assign(k_derope, self.centroids)

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
        mass = self.router.mass(q_derope)
        if share == "group":
            mass = mass.unflatten(1, (self.centroids.shape[0], -1)).sum(2)
        if not per_row:
            return mass
        return mass / expand_heads(sizes.float().clamp(min=1), mass.shape[1]) ** SIZE_POWER
