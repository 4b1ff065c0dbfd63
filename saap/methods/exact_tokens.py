"""The true top tokens, by exact scores: the ceiling of every method that picks single rows.

`oracle-tokens` ranks rows by true attention weight (soft cap included) and is charged nothing.
`flat` is exact inner-product search, FAISS `IndexFlatIP` over all keys (Johnson et al., arXiv
1702.08734), and is charged what it reads: every key. For a KV group `oracle-tokens` adds the
heads' weights; `flat` merges the heads' results, a row by its best score relative to the head's
best.
"""

from saap.index.faiss_backend import flat_search

from .search_results import merge_results
from .snapshot import RowChooser, middle_scores
from .tokens import TokenChooser, TokenMethod, no_ranges, rows_as_ranges


class OracleTokensChooser(TokenChooser):
    is_exact = True

    def __init__(self, keys):
        super().__init__(keys)
        self.keys = keys

    def scores(self, q_rope):
        return middle_scores(self.keys.layer, self.keys.k_rope, q_rope)


class OracleTokens(TokenMethod):
    name = "oracle-tokens"

    def build(self, keys):
        return OracleTokensChooser(keys)


class FlatChooser(RowChooser):
    def __init__(self, keys):
        self.keys = keys.k_rope
        self.nbytes = self.keys.numel() * self.keys.element_size()

    def select(self, q_rope, budget, outside):
        n_kv, n_middle = self.keys.shape[:2]
        k = min(budget.max_tokens, n_middle)
        if k == 0:
            return no_ranges(q_rope, n_kv, budget.share)
        queries = q_rope.unflatten(1, (n_kv, -1))
        found = [flat_search(self.keys[h], queries[:, h].flatten(0, 1), k) for h in range(n_kv)]
        return rows_as_ranges(merge_results(found, queries.shape[2], n_middle, k, budget.share))


class Flat(TokenMethod):
    name = "flat"
    weighs_heads = False

    def build(self, keys):
        return FlatChooser(keys)
