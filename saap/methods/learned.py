"""Routing over a k-means partition of de-RoPEd keys, learned or told by what RoPE does.

`linear` scores buckets with the closed-form least-squares map from query to bucket mass, `mlp`
with the classifier of Saap (arXiv 2502.08246, section 4.2). `kmeans-cells` trains nothing but
k-means: it visits cells, time segments of buckets, by the expected score of their centroid at
their distance (`saap.routing`). `saap` is both, blended. For a selection shared by a KV group the
predicted masses of its query heads are added.
"""

import torch

from saap.index.lists import invert
from saap.routing import LayerRouting

from .base import BucketSelector, Method


class RoutedSelector(BucketSelector):
    def __init__(self, keys, routing: LayerRouting):
        self.n_middle, self.window = keys.k_derope.shape[2], keys.window
        place = torch.arange(self.n_middle, device=keys.k_derope.device)
        lists = routing.lists_of(routing.assign(keys.k_derope), place, self.n_middle)
        super().__init__(invert(lists, routing.n_lists))
        self.routing = routing
        self.predicts_weights = routing.predicts_weights
        self.nbytes = routing.nbytes

    def scores_rows(self, budget):
        return self.routing.ranks_by_row(budget)

    def scores(self, q_rope, q_derope, budget):
        return self.routing.scores(
            q_derope,
            self.lists.sizes,
            self.n_middle,
            self.ahead + self.window + self.n_middle - 1,
            share=budget.share,
            per_row=self.scores_rows(budget),
        )


class Linear(Method):
    name = "linear"
    router = "linear"
    n_segments: int | None = 1

    def build(self, keys):
        layer = self.index.layers[keys.layer]
        return RoutedSelector(keys, LayerRouting.of(layer, self.router, self.n_segments))


class MLP(Linear):
    name = "mlp"
    router = "mlp"


class KMeansCells(Linear):
    name = "kmeans-cells"
    router = "centroid"
    n_segments = None


class Saap(Linear):
    name = "saap"
    n_segments = None

    @property
    def router(self):
        return self.index.default_router
