"""IVF as vector search does it: visit the buckets whose centroids are nearest to the query.

`kmeans` clusters de-RoPEd keys and routes de-RoPEd queries; `kmeans-rope` leaves RoPE on both. The
symmetric baselines of Saap (arXiv 2502.08246, table 1). For a selection shared by a KV group the
heads' softmax over centroids is summed, as RetroInfer (arXiv 2505.02922) does, with centroids
scaled to the mean length of the context's keys.
"""

from saap.index.kmeans import assign
from saap.index.lists import group_sum, invert
from saap.index.routers import CentroidRouter

from .base import BucketSelector, Method


class CentroidSelector(BucketSelector):
    def __init__(self, keys, vectors, centroids, *, roped: bool):
        super().__init__(invert(assign(vectors, centroids), centroids.shape[1]))
        self.router = CentroidRouter(centroids)
        self.nbytes = self.router.nbytes
        self.roped = roped
        self.n_kv = centroids.shape[0]
        length = vectors.float().norm(dim=-1).mean(-1)[0]
        self.temperature = (length * keys.sm_scale).repeat_interleave(keys.n_heads // self.n_kv)

    def scores(self, q_rope, q_derope, budget):
        scores = self.router.mass(q_rope if self.roped else q_derope)
        if budget.share == "head":
            return scores
        return group_sum((scores * self.temperature[:, None]).softmax(-1), self.n_kv)


class KMeans(Method):
    name = "kmeans"

    def build(self, keys):
        centroids = self.index.layers[keys.layer].centroids
        return CentroidSelector(keys, keys.k_derope, centroids, roped=False)


class KMeansRope(Method):
    name = "kmeans-rope"

    def build(self, keys):
        centroids = self.index.layers[keys.layer].centroids_rope
        if centroids is None:
            raise ValueError(
                "method 'kmeans-rope' needs an index trained with --baselines: this one holds no "
                "centroids of RoPE'd keys"
            )
        return CentroidSelector(keys, keys.k_rope, centroids, roped=True)
