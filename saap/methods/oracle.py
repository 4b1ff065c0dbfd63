"""The oracle of a partition: the lists with the largest true attention mass.

It reads every key, which is no price that anyone could pay, so it is charged nothing: the ceiling
of every method over the same lists (cells, or buckets where the index has no cells). Where the
budget is rows it takes lists by mass per row, otherwise by mass.
"""

from saap.index.cells import cells_of
from saap.index.lists import group_sum

from .base import Method
from .lists import ListSelector
from .snapshot import attention_weights, middle_scores


class OracleSelector(ListSelector):
    def __init__(self, layer, index):
        super().__init__(index.centroids, index.n_segments)
        self.layer = layer

    def update(self, middle):
        super().update(middle)
        self.list_of_row = [
            cells_of(
                middle.lists[b, :, :n],
                middle.tokens[b, :, :n] - middle.first_row,
                n,
                self.n_segments,
            )
            if self.n_segments > 1
            else middle.lists[b, :, :n].long()
            for b, n in enumerate(middle.n_rows)
        ]

    def scores(self, query, middle, budget):
        n_queries, n_heads = query.q_rope.shape[:2]
        mass = query.q_rope.new_zeros(n_queries, n_heads, self.n_lists)
        outside = query.beside_middle(self.layer)
        for b, lists in enumerate(self.list_of_row):
            own = slice(None) if len(self.list_of_row) == 1 else slice(b, b + 1)
            if middle.n_rows[b]:
                scores = middle_scores(self.layer, middle.keys_of(b), query.q_rope[own])
                weights = attention_weights(scores, None if outside is None else outside[own])
                member = lists.repeat_interleave(n_heads // middle.n_kv, 0)
                mass[own].scatter_add_(-1, member.expand_as(weights), weights)
        sizes = self.sizes.float().clamp(min=1)
        if budget.share == "group":
            mass = group_sum(mass, middle.n_kv)
        else:
            sizes = sizes.repeat_interleave(n_heads // middle.n_kv, 1)
        return mass if budget.max_tokens is None else mass / sizes


class Oracle(Method):
    name = "oracle"

    def selector(self, layer):
        return OracleSelector(layer, self.layer_index(layer))
