"""IVF as vector search does it: visit the buckets whose centroids are nearest to the query.

`kmeans` clusters de-RoPEd keys and routes de-RoPEd queries; `kmeans-rope` leaves RoPE on both. The
symmetric baselines of Saap (arXiv 2502.08246, table 1). For a selection shared by a KV group the
heads' softmax over centroids is summed, as RetroInfer (arXiv 2505.02922) does, with centroids
scaled to the mean length of the keys.
"""

import torch

from saap.index.lists import group_sum
from saap.index.routers import CentroidRouter

from .base import Method
from .lists import ListSelector


class CentroidSelector(ListSelector):
    def __init__(self, layer, centroids, *, roped: bool):
        super().__init__(centroids)
        self.assigns_by = "rope" if roped else "derope"
        self.router = CentroidRouter(centroids)
        self.nbytes = self.router.nbytes
        self.sm_scale = layer.sm_scale

    def update(self, middle):
        super().update(middle)
        # RoPE changes no length, so that of the stored keys is that of the clustered ones.
        lengths = [middle.keys_of(b).float().norm(dim=-1).mean(-1) for b in range(len(self.sizes))]
        self.temperature = torch.stack(lengths).nan_to_num() * self.sm_scale

    def scores(self, query, middle, budget):
        roped = self.assigns_by == "rope"
        scores = self.router.mass(query.q_rope if roped else query.q_derope)
        if budget.share == "head":
            return scores
        group = scores.shape[1] // middle.n_kv
        temperature = self.temperature.repeat_interleave(group, 1)[..., None]
        return group_sum((scores * temperature).softmax(-1), middle.n_kv)


class KMeans(Method):
    name = "kmeans"

    def selector(self, layer):
        return CentroidSelector(layer, self.layer_index(layer).centroids, roped=False)


class KMeansRope(Method):
    name = "kmeans-rope"

    def __init__(self, index=None, *, seed=0):
        super().__init__(index, seed=seed)
        if all(own is None or own.centroids_rope is None for own in index.layers):
            raise ValueError(
                "method 'kmeans-rope' needs an index trained with --baselines; got one without "
                "centroids of RoPE'd keys"
            )

    def selector(self, layer):
        return CentroidSelector(layer, self.layer_index(layer).centroids_rope, roped=True)
