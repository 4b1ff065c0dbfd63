"""Routing of one layer: which inverted list a key belongs to, and what each list is worth.

The one place that the methods and the KV store share.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saap.index.cells import cells_of
from saap.index.kmeans import assign
from saap.index.lists import expand_heads, group_sum
from saap.index.routers import MLPRouter, Router
from saap.kernels.routing import cell_weights

from .budget import Budget
from .trained_index import LayerIndex

# Where the budget is rows, a bucket is worth its mass per row. Predicted masses of small buckets
# are noisy, so for routers that do not know the sizes the size counts by its root: between mass
# and mass per row, better than both.
SIZE_POWER = 0.5
# Share of the trained router in the blend with turned centroids. Their errors are unlike, so the
# mean of both is better than either (docs/partitions.md).
TRAINED_SHARE = 0.5


@dataclass(frozen=True)
class LayerRouting:
    """Partition and router of one layer.

    Keys and queries are de-RoPEd: `k [B, Hkv, T, D]`, `q [B, Hq, D]`. A list is a bucket, or, with
    `n_segments` above 1, a cell: one of the time segments of a bucket. All keys of a cell are
    about as far from the query, so what RoPE makes of its centroid is known: the expected score of
    a cell is `sm_scale * key_scale_b * (R(age) q) . c_b`. That is the score where the router is
    "centroid", and half of it (in the logarithm) where the router is "mlp".

    Source: partition and classifier are those of Saap, arXiv 2502.08246; cells are ours.
    """

    centroids: Float[Tensor, "Hkv nlist D"]
    router: Router
    n_segments: int = 1
    key_scale: Float[Tensor, "Hkv nlist"] | None = None
    inv_freq: Float[Tensor, " pairs"] | None = None
    interleaved: bool = False
    sm_scale: float = 1.0
    trained_share: float = TRAINED_SHARE

    @classmethod
    def of(cls, layer: LayerIndex, router: str, n_segments: int | None = None) -> "LayerRouting":
        """`n_segments` None takes the layer's own; routers that have no use for it take buckets.

        Raises ValueError when the layer has no router of that name.
        """
        if router not in ("mlp", "centroid") or layer.inv_freq is None:
            n_segments = 1
        return cls(
            layer.centroids,
            layer.router(router),
            layer.n_segments if n_segments is None else n_segments,
            layer.key_scale,
            layer.inv_freq,
            layer.interleaved,
            layer.sm_scale,
        )

    def to(self, device: torch.device | str) -> "LayerRouting":
        def moved(tensor):
            return None if tensor is None else tensor.to(device)

        router = type(self.router)(**{n: moved(t) for n, t in self.router.tensors().items()})
        tensors = {n: moved(getattr(self, n)) for n in ("centroids", "key_scale", "inv_freq")}
        return replace(self, router=router, **tensors)

    @property
    def predicts_weights(self) -> bool:
        """Whether scores by row are attention weights; of the middle alone without a network."""
        return self.n_segments > 1 or isinstance(self.router, MLPRouter)

    def ranks_by_row(self, budget: Budget) -> bool:
        """Whether lists are ranked by worth a row: they cost rows, unless buckets are counted."""
        if budget.top_p is not None and not self.predicts_weights:
            return False
        return any(b is not None for b in (budget.max_tokens, budget.top_p, budget.min_weight))

    @property
    def nlist(self) -> int:
        return self.centroids.shape[1]

    @property
    def n_lists(self) -> int:
        return self.nlist * self.n_segments

    @property
    def nbytes(self) -> int:
        """Bytes that one decode step reads to score the lists."""
        read = {id(t): t.nbytes for t in self.router.tensors().values()}
        if self.n_segments > 1:
            read |= {id(t): t.nbytes for t in (self.centroids, self.key_scale, self.inv_freq)}
        return sum(read.values())

    def assign(self, k_derope: Float[Tensor, "B Hkv T D"]) -> Int[Tensor, "B Hkv T"]:
        """The bucket of each key."""
        return assign(k_derope, self.centroids)

    def lists_of(
        self, buckets: Int[Tensor, "*any"], place: Int[Tensor, "*any"], n_middle: int
    ) -> Int[Tensor, "*any"]:
        """The list of each key from its bucket and its place (0 the oldest) in the middle.

        Lists of a bucket follow each other from old to new.
        """
        if self.n_segments == 1:
            return buckets
        return cells_of(buckets, place, n_middle, self.n_segments)

    def scores(
        self,
        q_derope: Float[Tensor, "B Hq D"],
        sizes: Int[Tensor, "B Hkv n_lists"],
        n_middle: int | Int[Tensor, " B"],
        distance: int | Int[Tensor, " B"],
        *,
        share: str = "group",
        per_row: bool = True,
        impl: str | None = None,
    ) -> Float[Tensor, "B H n_lists"]:
        """Higher is visited first. `H` is Hkv for `share="group"`, else Hq.

        `n_middle`: keys in the lists; `distance`: how far the oldest of them is from the query.
        `per_row`: worth by rows visited (for `max_tokens`), else predicted mass (`nprobe`,
        `top_p`). `impl`: of `saap.kernels.routing.cell_weights`; buckets without segments are
        scored by their router alone.
        """
        if self.n_segments > 1:
            return cell_weights(
                q_derope,
                self.typical_keys,
                self.inv_freq,
                sizes,
                n_middle,
                distance,
                n_segments=self.n_segments,
                network=self._network,
                trained_share=self.trained_share,
                interleaved=self.interleaved,
                share=share,
                by_size=not per_row,
                impl=impl,
            )
        mass = self.router.mass(q_derope, sizes)
        if share == "group":
            mass = group_sum(mass, len(self.centroids))
        if not per_row:
            return mass
        rows = expand_heads(sizes.float().clamp(min=1), mass.shape[1])
        return mass / (rows if isinstance(self.router, MLPRouter) else rows**SIZE_POWER)

    @cached_property
    def _network(self) -> tuple[Tensor, ...] | None:
        learned = isinstance(self.router, MLPRouter)
        return tuple(self.router.tensors().values()) if learned else None

    @cached_property
    def typical_keys(self) -> Float[Tensor, "Hkv nlist D"]:
        """Centroids as long as the keys of their buckets, and scaled as scores are."""
        return self.centroids * (self.key_scale * self.sm_scale)[..., None]
