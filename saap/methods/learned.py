"""Learned routing over a k-means partition of de-RoPEd keys.

`saap` scores buckets with the trained classifier (Saap, arXiv 2502.08246, section 4.2); `linear`
with the closed-form least-squares map from query to bucket mass. For a selection shared by a KV
group the predicted masses of its query heads are added.
"""

from saap.index.lists import invert
from saap.routing import LayerRouting

from .base import BucketSelector, Method


class RoutedSelector(BucketSelector):
    def __init__(self, keys, routing: LayerRouting):
        super().__init__(invert(routing.assign(keys.k_derope), routing.n_lists))
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
        return RoutedSelector(keys, LayerRouting.of(self.index.layers[keys.layer], self.router))


class Saap(Linear):
    name = "saap"
    router = "mlp"
