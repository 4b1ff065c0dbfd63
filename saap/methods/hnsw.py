"""Graph search over RoPE'd keys: the rows that a best-first walk of an HNSW graph finds.

The family of RetrievalAttention (Liu et al., arXiv 2409.10516), which builds its graph from
prefill queries too; this is the plain graph over keys (Malkov and Yashunin, arXiv 1603.09320) in
FAISS. Each query head walks the graph of its KV head; a KV group merges what its heads found, a
row by its best score relative to the head's best. Where the walk found fewer rows than the budget,
the newest of the others fill it.
"""

from dataclasses import dataclass

from saap.index.faiss_backend import Graph

from .base import check_within
from .search_results import merge_results
from .snapshot import RowChooser
from .tokens import TokenMethod, no_ranges, rows_as_ranges


@dataclass(frozen=True)
class HNSWBuild:
    neighbours: int = 16
    ef_construction: int = 64

    def __post_init__(self):
        check_within(self, neighbours=(2, 1024), ef_construction=(1, 1 << 20))


@dataclass(frozen=True)
class HNSWSearch:
    """`ef`: the width of the walk; it is never less than the rows asked for."""

    ef: int = 64

    def __post_init__(self):
        check_within(self, ef=(1, 1 << 30))


class HNSWChooser(RowChooser):
    """`nbytes`: compared keys and their ids, a step, as the latest `select` read them."""

    def __init__(self, keys, method):
        self.method, build = method, method.build_options
        self.n_kv, self.n_middle, self.dim = keys.k_rope.shape
        self.graphs = [
            Graph(head, neighbours=build.neighbours, ef_construction=build.ef_construction)
            for head in keys.k_rope
        ]

    def select(self, q_rope, budget, outside):
        k = min(budget.max_tokens, self.n_middle)
        if k == 0:
            return no_ranges(q_rope, self.n_kv, budget.share)
        queries = q_rope.unflatten(1, (self.n_kv, -1))
        found, compared = [], 0
        for head, graph in enumerate(self.graphs):
            scores, ids, n = graph.search(
                queries[:, head].flatten(0, 1), k, ef=max(k, self.method.search_options.ef)
            )
            found.append((scores, ids))
            compared += n
        # A compared key is read as float32, and its id from a neighbour list as int32.
        self.nbytes = round(compared * (4 * self.dim + 4) / len(q_rope))
        return rows_as_ranges(
            merge_results(found, queries.shape[2], self.n_middle, k, budget.share)
        )


class HNSW(TokenMethod):
    name = "hnsw"
    weighs_heads = False
    follows = False

    def __init__(
        self,
        index=None,
        *,
        seed=0,
        build: HNSWBuild | None = None,
        search: HNSWSearch | None = None,
    ):
        super().__init__(index, seed=seed)
        self.build_options, self.search_options = build or HNSWBuild(), search or HNSWSearch()

    def build(self, keys):
        return HNSWChooser(keys, self)
