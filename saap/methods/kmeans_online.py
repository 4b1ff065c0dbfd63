"""Per-context k-means: clusters of this context's own RoPE'd keys, routed by their means.

Source: RetroInfer (Chen et al., arXiv 2505.02922): spherical k-means of mean-centred keys within
segments of 8192 rows, 16 rows a cluster, 10 iterations; a KV group adds its heads' softmax over
clusters. Its estimate of the unvisited clusters is not part of the selection and is left out.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saap.index.kmeans import assign, train_centroids
from saap.index.lists import invert

from .base import check_within
from .snapshot import BucketChooser, LayerKeys, SnapshotMethod
from .tokens import combine_heads, key_scores


@dataclass(frozen=True)
class OnlineBuild:
    rows_per_cluster: int = 16
    segment: int = 8192
    n_iter: int = 10

    def __post_init__(self):
        check_within(self, rows_per_cluster=(1, 1 << 30), segment=(1, 1 << 30), n_iter=(0, 1000))


def cluster_segments(keys, build: OnlineBuild, seed: int) -> tuple[torch.Tensor, int]:
    """The cluster of each row `[Hkv, M]` int32 and how many; segments do not share clusters."""
    parts, n_clusters = [], 0
    for start in range(0, max(1, keys.shape[1]), build.segment):
        rows = keys[:, start : start + build.segment].float()
        centred = rows - rows.mean(1, keepdim=True)
        # A key that is the mean has no direction; any will do.
        centred = torch.where((centred == 0).all(-1, keepdim=True), 1.0, centred)
        nlist = max(1, rows.shape[1] // build.rows_per_cluster)
        if nlist == 1:
            parts.append(torch.full(rows.shape[:2], n_clusters, dtype=torch.int32).to(keys.device))
        else:
            centroids = train_centroids(centred, nlist, n_iter=build.n_iter, seed=seed)
            parts.append(assign(centred, centroids) + n_clusters)
        n_clusters += nlist
    return torch.cat(parts, 1), n_clusters


def bucket_means(
    values: Float[Tensor, "Hkv M D"],
    buckets: Int[Tensor, "Hkv M"],
    sizes: Int[Tensor, "Hkv nlist"],
) -> Float[Tensor, "Hkv nlist D"]:
    """Mean of each bucket's values, float32; 0 for an empty bucket."""
    sums = values.new_zeros(*sizes.shape, values.shape[2], dtype=torch.float32)
    sums.scatter_add_(1, buckets.long()[..., None].expand_as(values), values.float())
    return sums / sizes[..., None].clamp(min=1)


class OnlineChooser(BucketChooser):
    def __init__(self, keys: LayerKeys, build: OnlineBuild, seed: int):
        buckets, n_clusters = cluster_segments(keys.k_rope, build, seed)
        super().__init__(invert(buckets[None], n_clusters))
        self.means = bucket_means(keys.k_rope, buckets, self.lists.sizes[0])
        self.sm_scale = keys.layer.sm_scale
        self.nbytes = self.means.numel() * keys.k_rope.element_size()

    def scores(self, q_rope, budget):
        scores = key_scores(q_rope, self.means, self.sm_scale)
        return combine_heads(scores, self.means.shape[0]) if budget.share == "group" else scores


class KMeansOnline(SnapshotMethod):
    name = "kmeans-online"
    follows = False
    keeps_order = False

    def __init__(self, index=None, *, seed=0, build: OnlineBuild | None = None):
        super().__init__(index, seed=seed)
        self.build_options = build or OnlineBuild()

    def build(self, keys):
        return OnlineChooser(keys, self.build_options, self.seed)
