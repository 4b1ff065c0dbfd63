"""The interface of a method: build a selector for one layer's middle, then select ranges of it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saap.budget import Budget, check_predicts_weights
from saap.index.lists import InvertedLists
from saap.ranges import Ranges, best_ranges
from saap.trained_index import TrainedIndex


@dataclass(frozen=True)
class LayerKeys:
    """The middle of one layer's cache: `k_rope, k_derope [1, Hkv, M, D]`, in time order.

    `window` tokens follow it.
    """

    layer: int
    k_rope: Float[Tensor, "1 Hkv M D"]
    k_derope: Float[Tensor, "1 Hkv M D"]
    n_heads: int
    sm_scale: float
    softcap: float | None = None
    window: int = 0


class Selector(ABC):
    """Chooses rows of one layer's middle for queries `q_rope, q_derope [n, Hq, D]`."""

    order: Int[Tensor, "1 Hkv M"] | None = None
    """Rows of the middle in the order the store shall keep them; None is time order."""

    ahead: int | Int[Tensor, " n"] = 1
    """How far the queries are from the newest token of the context; whoever asks sets it."""

    nbytes: int = 0
    """Bytes that choosing reads in one step of this layer: routers, centroids, summaries."""

    @abstractmethod
    def select(self, q_rope: Tensor, q_derope: Tensor, budget: Budget) -> Ranges:
        """`starts, lengths` int32 `[n, H, R]`, rows counted from the first of the middle."""


class Method(ABC):
    """One way to choose. `name` is its key in `METHODS`; `index` may be None if it needs none."""

    name: ClassVar[str]
    needs_index: ClassVar[bool] = True

    def __init__(self, index: TrainedIndex | None = None, *, seed: int = 0):
        if self.needs_index and index is None:
            raise ValueError(f"method {self.name!r} needs a trained index: pass --index FILE")
        self.index, self.seed = index, seed

    @abstractmethod
    def build(self, keys: LayerKeys) -> Selector: ...


class BucketSelector(Selector):
    """Selects whole buckets of a partition by score; subclasses say how buckets are scored."""

    predicts_weights = False
    """Whether scores by row are attention weights, as `budget.min_weight` needs."""

    def __init__(self, lists: InvertedLists):
        self.lists = lists
        self.order = lists.order

    def scores_rows(self, budget: Budget) -> bool:
        """Whether scores are worth a row; else they are worth a bucket."""
        return False

    @abstractmethod
    def scores(
        self, q_rope: Tensor, q_derope: Tensor, budget: Budget
    ) -> Float[Tensor, "n H nlist"]:
        """Higher is visited first. `H` is Hkv for `budget.share == "group"`, else Hq."""

    def select(self, q_rope, q_derope, budget):
        check_predicts_weights(self.predicts_weights, budget)
        scores = self.scores(q_rope, q_derope, budget)
        return best_ranges(
            scores,
            self.lists.offsets,
            nprobe=budget.nprobe,
            max_tokens=budget.max_tokens,
            top_p=budget.top_p,
            min_score=budget.min_weight,
            per_row=self.scores_rows(budget),
        )


def middle_weights(keys: LayerKeys, q_rope: Float[Tensor, "n Hq D"]) -> Float[Tensor, "n Hq M"]:
    """Softmax over the middle alone: for oracles, which may look at everything."""
    n_kv = keys.k_rope.shape[1]
    q = q_rope.float().unflatten(1, (n_kv, -1))
    scores = torch.einsum("nhgd,hmd->nhgm", q, keys.k_rope[0].float()) * keys.sm_scale
    if keys.softcap is not None:
        scores = keys.softcap * torch.tanh(scores / keys.softcap)
    return scores.softmax(-1).flatten(1, 2)
