"""What methods that rank single tokens share: the best `max_tokens` rows, as ranges."""

from abc import abstractmethod
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saap.selector import Ranges

from .snapshot import LayerKeys, RowChooser, SnapshotMethod, attention_weights


def rows_as_ranges(rows: Int[Tensor, "n H k"]) -> Ranges:
    """Distinct rows, in any order, as ranges; neighbours join, unused ranges have length 0."""
    rows = rows.sort(-1).values
    if rows.shape[-1] == 0:
        return rows.int(), rows.int()
    begins = torch.ones_like(rows, dtype=torch.bool)
    begins[..., 1:] = rows.diff(dim=-1) != 1
    place = begins.long().cumsum(-1) - 1
    lengths = torch.zeros_like(rows).scatter_add_(-1, place, torch.ones_like(rows))
    starts = torch.zeros_like(rows).scatter_reduce_(-1, place, rows, "amax")
    starts = torch.where(lengths > 0, starts - lengths + 1, 0)
    n_ranges = int(place[..., -1].max()) + 1
    return starts[..., :n_ranges].int(), lengths[..., :n_ranges].int()


def no_ranges(q_rope: Float[Tensor, "n Hq D"], n_kv: int, share: str) -> Ranges:
    """A selection of nothing."""
    heads = n_kv if share == "group" else q_rope.shape[1]
    empty = torch.zeros(len(q_rope), heads, 0, dtype=torch.int32, device=q_rope.device)
    return empty, empty


def combine_heads(
    scores: Float[Tensor, "n Hq M"], n_kv: int, outside: Float[Tensor, "n Hq"] | None = None
) -> Float[Tensor, "n Hkv M"]:
    """One ranking for a KV group: the sum over its query heads of the softmax of their scores.

    `outside`: as for `attention_weights`.
    """
    return attention_weights(scores, outside).unflatten(1, (n_kv, -1)).sum(2)


def key_scores(
    q_rope: Float[Tensor, "n Hq D"], keys: Float[Tensor, "Hkv M D"], sm_scale: float
) -> Float[Tensor, "n Hq M"]:
    """Scaled inner products of each query head with the vectors of its KV head."""
    q = q_rope.float().unflatten(1, (keys.shape[0], -1))
    return torch.einsum("nhgd,hmd->nhgm", q, keys.float()).flatten(1, 2) * sm_scale


class TokenChooser(RowChooser):
    """Ranks every row of the middle; subclasses say how a row is scored.

    `scores` are logits of attention as the method knows them. A KV group ranks rows by the sum
    over its query heads of the attention weights that follow from them (`combine_heads`): a head
    that looks at the sinks has little to say.
    """

    is_exact: ClassVar[bool] = False
    """Whether scores are attention's own. What others add up to over thousands of rows is not
    told: powers of e of scores that err are too large in the mean."""

    def __init__(self, keys: LayerKeys):
        self.n_kv, self.n_middle = keys.n_kv, keys.n_rows

    @abstractmethod
    def scores(self, q_rope: Float[Tensor, "n Hq D"]) -> Float[Tensor, "n Hq M"]: ...

    def combine(
        self, scores: Float[Tensor, "n Hq M"], outside: Float[Tensor, "n Hq"] | None
    ) -> Float[Tensor, "n Hkv M"]:
        return combine_heads(scores, self.n_kv, outside)

    def select(self, q_rope, budget, outside):
        combined = scores = self.scores(q_rope)
        if budget.share == "group":
            combined = self.combine(scores, outside)
        k = min(budget.max_tokens, self.n_middle)
        rows = combined.topk(k, dim=-1).indices
        if self.is_exact and budget.estimate_rest:
            own = rows.repeat_interleave(scores.shape[1] // rows.shape[1], 1)
            self.left_out = scores.scatter(-1, own, -torch.inf).logsumexp(-1)
        return rows_as_ranges(rows)


class TokenMethod(SnapshotMethod):
    """A method that ranks single rows: it has no buckets, so its bound is `max_tokens` alone."""

    bounds = ("max_tokens",)
    visits_best = True
    weighs_heads = True
