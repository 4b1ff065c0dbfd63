"""Selectors that look at all keys of one sequence at once: pages, codes, graphs, exact scores.

A method of this kind writes `build`, which gets the keys of one sequence's middle and returns what
chooses among them; the store's sequences are kept apart here. `follows` says whether `build` is
cheap enough to be called again whenever tokens join the middle. Where it is not, it is called
once, at the first decode step: later tokens stay in the tail and are always visited, so that a
step costs more the longer the answer is.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saap.budget import Budget
from saap.index.lists import InvertedLists
from saap.kernels.rest import Scored
from saap.kernels.routing import select_lists
from saap.selector import LayerInfo, Middle, Query, RangeBuffer, Ranges, Selector

from .base import Method


@dataclass(frozen=True)
class LayerKeys:
    """The middle of one sequence in one layer: `k_rope [Hkv, M, D]` in time order."""

    layer: LayerInfo
    k_rope: Float[Tensor, "Hkv M D"]

    @property
    def n_kv(self) -> int:
        return self.k_rope.shape[0]

    @property
    def n_rows(self) -> int:
        return self.k_rope.shape[1]


class RowChooser(ABC):
    """Chooses rows of one sequence's middle for queries `q_rope [n, Hq, D]`."""

    order: Int[Tensor, "Hkv M"] | None = None
    """The order in which the store shall keep the rows; None is time order."""

    nbytes: int = 0
    """Bytes that choosing reads in one step."""

    left_out: Float[Tensor, "n Hq"] | None = None
    """The log-sum-exp of each head's scores with all rows that the latest `select` did not choose;
    None if it does not know them."""

    @abstractmethod
    def select(
        self,
        q_rope: Float[Tensor, "n Hq D"],
        budget: Budget,
        outside: Float[Tensor, "n Hq"] | None,
    ) -> Ranges:
        """`starts, lengths` int32 `[n, H, R]`, rows counted from the first of the middle.

        `outside`: log-sum-exp of all that takes its part of the softmax beside the middle, if the
        method `weighs_heads` and it is known.
        """


class SnapshotMethod(Method):
    """A method that is built on the keys of one sequence's middle."""

    needs_index = False
    follows: ClassVar[bool] = True
    visits_best: ClassVar[bool] = False
    weighs_heads: ClassVar[bool] = False
    """Whether choosers ask what sinks and tail hold of a head's attention."""

    keeps_order: ClassVar[bool] = True
    """Whether the choosers that it builds leave rows in time order."""

    @abstractmethod
    def build(self, keys: LayerKeys) -> RowChooser: ...

    def selector(self, layer: LayerInfo) -> Selector:
        return Snapshot(self, layer)


class Snapshot(Selector):
    """One `RowChooser` for each sequence of a store."""

    def __init__(self, method: SnapshotMethod, layer: LayerInfo):
        self.method, self.layer = method, layer
        self.follows = method.follows
        self.waits = not method.follows
        self.visits_best = method.visits_best
        self.choosers: list[RowChooser | None] = []

    @property
    def bounds(self) -> tuple[str, ...]:
        return self.method.bounds

    @property
    def keeps_order(self) -> bool:
        return self.method.keeps_order

    @property
    def nbytes(self) -> int:
        held = [c.nbytes for c in self.choosers if c is not None]
        return round(sum(held) / max(1, len(held)))

    def check_budget(self, budget: Budget) -> None:
        self.method.check_budget(budget)

    def update(self, middle: Middle):
        self.choosers = [
            self.method.build(LayerKeys(self.layer, _finite(middle.keys_of(b)))) if n else None
            for b, n in enumerate(middle.n_rows)
        ]
        orders = [None if c is None else c.order for c in self.choosers]
        if all(order is None for order in orders):
            return None
        return [
            torch.arange(n, device=middle.device).expand(middle.n_kv, -1) if o is None else o
            for o, n in zip(orders, middle.n_rows, strict=True)
        ]

    def select(self, query: Query, middle: Middle, budget: Budget, room: RangeBuffer) -> Ranges:
        asks = self.method.weighs_heads and budget.share == "group"
        outside = query.beside_middle(self.layer) if asks else None
        if len(self.choosers) == 1:
            starts, lengths = self.choosers[0].select(query.q_rope, budget, outside)
            self.left_out = self._left_out(query.q_rope, middle, budget)
            return starts + middle.first_row, lengths
        found = [
            None
            if chooser is None
            else chooser.select(
                query.q_rope[b : b + 1], budget, None if outside is None else outside[b : b + 1]
            )
            for b, chooser in enumerate(self.choosers)
        ]
        heads = middle.n_kv if budget.share == "group" else query.q_rope.shape[1]
        most = max(pair[0].shape[-1] for pair in found if pair is not None)
        starts = torch.zeros(len(found), heads, most, dtype=torch.int32, device=middle.device)
        lengths = torch.zeros_like(starts)
        for b, pair in enumerate(found):
            if pair is not None:
                starts[b, :, : pair[0].shape[-1]] = pair[0][0] + middle.first_row
                lengths[b, :, : pair[1].shape[-1]] = pair[1][0]
        self.left_out = self._left_out(query.q_rope, middle, budget)
        return starts, lengths

    def _left_out(self, q: Tensor, middle: Middle, budget: Budget) -> Scored | None:
        known = [None if c is None else c.left_out for c in self.choosers]
        if not (self.visits_best and budget.estimate_rest) or all(own is None for own in known):
            return None
        floats = {"dtype": torch.float32, "device": q.device}
        lse = torch.full(q.shape[:2], -torch.inf, **floats)
        for b, own in enumerate(known):
            if own is not None:
                lse[slice(None) if len(known) == 1 else slice(b, b + 1)] = own
        n_rows = torch.tensor(middle.n_rows, device=q.device)[:, None].expand(len(q), middle.n_kv)
        mean = torch.zeros(1, middle.n_kv, middle.dim, **floats)
        return Scored(lse, mean, n_rows, n_best=max(middle.n_rows))


def _finite(keys: Float[Tensor, "Hkv M D"]) -> Float[Tensor, "Hkv M D"]:
    """NaN and infinities as 0: one such row must not stop those of other sequences."""
    if bool(keys.isfinite().all()):
        return keys
    return torch.where(keys.isfinite(), keys, 0)


class BucketChooser(RowChooser):
    """Visits whole buckets of a partition of these rows; subclasses say how one is scored."""

    def __init__(self, lists: InvertedLists):
        self.lists, self.order = lists, lists.order[0]

    @abstractmethod
    def scores(self, q_rope: Tensor, budget: Budget) -> Float[Tensor, "n H nlist"]:
        """Higher is visited first. `H` is Hkv for `budget.share="group"`, else Hq."""

    def select(self, q_rope, budget, outside):
        bounds = {name: getattr(budget, name) for name in ("nprobe", "max_tokens", "top_p")}
        if bounds["nprobe"] is not None:
            bounds["nprobe"] = min(bounds["nprobe"], self.lists.nlist)
        return select_lists(self.scores(q_rope, budget), self.lists.offsets, **bounds)


def middle_scores(
    layer: LayerInfo, k_rope: Float[Tensor, "Hkv M D"], q_rope: Float[Tensor, "n Hq D"]
) -> Float[Tensor, "n Hq M"]:
    """Attention's scores, soft cap included: for oracles, which may look at everything."""
    q = q_rope.float().unflatten(1, (k_rope.shape[0], -1))
    scores = torch.einsum("nhgd,hmd->nhgm", q, k_rope.float()) * layer.sm_scale
    if layer.softcap is not None:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    return scores.flatten(1, 2)


def attention_weights(
    scores: Float[Tensor, "n Hq M"], outside: Float[Tensor, "n Hq"] | None
) -> Float[Tensor, "n Hq M"]:
    """Softmax of scores with the middle, beside the rows that a step visits in any case.

    `outside`: log-sum-exp of the scores with these. None: as if there were none.
    """
    if outside is None:
        return scores.softmax(-1)
    return torch.cat([scores, outside[..., None]], -1).softmax(-1)[..., :-1]
