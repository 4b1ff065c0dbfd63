"""What brackets every other method on the same partition: the oracle above, random buckets below.

The oracle knows the true attention mass of each list of the index (cells, or buckets where the
index has no cells). Where the budget is rows it takes them by mass per row, else by mass.
"""

import torch

from saap.index.cells import cells_of
from saap.index.kmeans import assign
from saap.index.lists import group_sum, invert

from .base import BucketSelector, Method, middle_weights


class OracleSelector(BucketSelector):
    def __init__(self, keys, centroids, n_segments):
        n = keys.k_derope.shape[2]
        place = torch.arange(n, device=keys.k_derope.device)
        self.buckets = cells_of(assign(keys.k_derope, centroids), place, n, n_segments)
        super().__init__(invert(self.buckets, centroids.shape[1] * n_segments))
        self.keys = keys
        # An oracle reads every key; that is not a price anyone could pay, so it is not counted.
        self.nbytes = 0

    def scores(self, q_rope, q_derope, budget):
        weights = middle_weights(self.keys, q_rope)
        group = weights.shape[1] // self.buckets.shape[1]
        buckets = self.buckets.repeat_interleave(group, 1).expand_as(weights)
        mass = weights.new_zeros(*weights.shape[:2], self.lists.nlist)
        mass.scatter_add_(-1, buckets, weights)
        sizes = self.lists.sizes.float().clamp(min=1)
        if budget.share == "group":
            mass = group_sum(mass, sizes.shape[1])
        else:
            sizes = sizes.repeat_interleave(group, 1)
        return mass if budget.max_tokens is None else mass / sizes


class Oracle(Method):
    name = "oracle"

    def build(self, keys):
        layer = self.index.layers[keys.layer]
        return OracleSelector(keys, layer.centroids, layer.n_segments)


class RandomSelector(BucketSelector):
    def __init__(self, keys, centroids, seed):
        super().__init__(invert(assign(keys.k_derope, centroids), centroids.shape[1]))
        self.n_heads = keys.n_heads
        self.generator = torch.Generator().manual_seed(seed + keys.layer)

    def scores(self, q_rope, q_derope, budget):
        heads = self.order.shape[1] if budget.share == "group" else self.n_heads
        shape = (q_rope.shape[0], heads, self.lists.nlist)
        return torch.rand(shape, generator=self.generator).to(q_rope.device)


class Random(Method):
    name = "random"

    def build(self, keys):
        return RandomSelector(keys, self.index.layers[keys.layer].centroids, self.seed)
