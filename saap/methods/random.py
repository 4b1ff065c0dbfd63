"""Random buckets of the trained partition: what every method has to beat."""

import torch

from .base import Method
from .lists import ListSelector


class RandomSelector(ListSelector):
    def __init__(self, centroids, seed):
        super().__init__(centroids)
        self.generator = torch.Generator().manual_seed(seed)

    def for_view(self):
        own = super().for_view()
        own.generator = self.generator.clone_state()
        return own

    def scores(self, query, middle, budget):
        heads = middle.n_kv if budget.share == "group" else query.q_rope.shape[1]
        shape = (len(query.q_rope), heads, self.n_lists)
        return torch.rand(shape, generator=self.generator, dtype=torch.float32).to(middle.device)


class Random(Method):
    name = "random"

    def selector(self, layer):
        return RandomSelector(self.layer_index(layer).centroids, self.seed + layer.number)
