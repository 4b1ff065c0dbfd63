"""Routing over a k-means partition of de-RoPEd keys, learned or told by what RoPE does.

`linear` scores buckets with the closed-form least-squares map from query to bucket mass, `mlp`
with the classifier of Saap (arXiv 2502.08246, section 4.2). `kmeans-cells` trains nothing but
k-means: it visits cells, time segments of buckets, by the expected score of their centroid at
their distance (`saap.routing`). `blend` is the mean of both; without a trained index it clusters
the keys of the prompt itself and is what `kmeans-cells` is over those. For a selection shared by a
KV group the predicted masses of its query heads are added.
"""

import torch

from saap.partition import partition_keys
from saap.routing import LayerRouting

from .base import Method
from .lists import ListSelector

SHORTEST_PARTITIONED = 1024  # tokens of a prompt that is worth clustering


class RoutedSelector(ListSelector):
    """Lists scored by a partition's router."""

    def __init__(self, routing: LayerRouting):
        super().__init__(routing.centroids, routing.n_segments)
        self.routing = routing
        self.predicts_weights = routing.predicts_weights
        self.nbytes = routing.nbytes

    def ranks_by_row(self, budget):
        return self.routing.ranks_by_row(budget)

    def scores(self, query, middle, budget):
        n_rows = middle.n_rows
        positions = torch.as_tensor(query.positions, device=middle.device)
        return self.routing.scores(
            query.q_derope,
            self.sizes,
            n_rows[0] if len(n_rows) == 1 else torch.tensor(n_rows, device=middle.device),
            positions - middle.first_row,
            share=budget.share,
            per_row=self.ranks_by_row(budget),
            impl=query.impl,
        )


class PromptSelector(RoutedSelector):
    """As RoutedSelector, over a partition of the first tokens' own keys; none for short ones."""

    predicts_weights = True

    def __init__(self, layer, seed):
        self.layer, self.seed = layer, seed
        self.layer_number = layer.number
        self.reset()

    def reset(self):
        self.routing, self.n_kv = None, None
        self.n_segments = self.n_assigned = 1

    @property
    def ready(self):
        return self.routing is not None

    def check_budget(self, budget):
        return  # how many lists there will be is not known yet

    def begin(self, k_derope, mask):
        if k_derope.shape[2] < SHORTEST_PARTITIONED:
            return
        layer = self.layer
        super().__init__(
            partition_keys(
                k_derope,
                layer.inv_freq,
                sm_scale=layer.sm_scale,
                interleaved=layer.interleaved,
                mask=mask,
                seed=self.seed,
            )
        )


class Linear(Method):
    name = "linear"
    router = "linear"
    n_segments: int | None = 1

    def selector(self, layer):
        own = self.layer_index(layer)
        routing = LayerRouting.of(own, self.router, self.n_segments)
        selector = RoutedSelector(routing.to(layer.device))
        selector.layer_number = layer.number
        return selector


class MLP(Linear):
    name = "mlp"
    router = "mlp"


class KMeansCells(Linear):
    name = "kmeans-cells"
    router = "centroid"
    n_segments = None


class Blend(Linear):
    name = "blend"
    needs_index = False
    n_segments = None

    @property
    def router(self):
        return self.index.default_router

    def selector(self, layer):
        if self.index is None:
            return PromptSelector(layer, self.seed)
        return super().selector(layer)
