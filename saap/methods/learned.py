"""Learned routing over a k-means partition of de-RoPEd keys.

`saap` scores the lists of the index with its default router: cells, buckets cut by age
(`saap.index.cells`). `mlp` is the form of Saap (arXiv 2502.08246, section 4.2): a classifier over
whole buckets. `linear` scores buckets with the closed-form least-squares map from query to bucket
mass. For a selection shared by a KV group the predicted masses of its query heads are added.
"""

from saap.index.lists import invert
from saap.routing import LayerRouting

from .base import BucketSelector, Method


class RoutedSelector(BucketSelector):
    def __init__(self, keys, routing: LayerRouting):
        lists = routing.lists_of(routing.assign(keys.k_derope), keys.age)
        super().__init__(invert(lists, routing.n_lists))
        self.routing = routing
        self.nbytes = routing.nbytes

    def scores(self, q_rope, q_derope, budget):
        return self.routing.scores(
            q_derope,
            self.lists.sizes,
            share=budget.share,
            per_row=budget.max_tokens is not None and budget.top_p is None,
        )


class Linear(Method):
    name = "linear"
    router = "linear"

    def build(self, keys):
        layer = self.index.layers[keys.layer]
        return RoutedSelector(keys, LayerRouting.of(layer, self.router))


class MLP(Linear):
    name = "mlp"
    router = "mlp"


class Saap(Linear):
    name = "saap"

    @property
    def router(self):
        return self.index.default_router
