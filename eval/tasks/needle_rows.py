"""Needles: single rows that a query head gives a twentieth of its attention or more.

Recall adds up over all rows, most of which hardly matter alone; an answer may hang on one row. So
two methods of equal recall may differ in the questions that they answer. Needles tell: a text has
thousands of them, and a method either visits one or does not.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

LEAST = 0.05
"""Of a head's attention, from which on a row is a needle."""

AT_ONCE = 1 << 22  # needles times ranges that are compared


@dataclass(frozen=True)
class Needles:
    """Those of n queries in a layer, m in all: by which query and head, which token, how much."""

    query: Int[Tensor, " m"]
    head: Int[Tensor, " m"]
    token: Int[Tensor, " m"]
    weight: Float[Tensor, " m"]
    n_heads: int

    @classmethod
    def of(
        cls, q: Float[Tensor, "n Hq D"], k: Float[Tensor, "Hkv N D"], lse: Float[Tensor, "n Hq"],
        *, first: int, stop: int, sm_scale: float, softcap: float | None = None,
    ) -> "Needles":  # fmt: skip
        """Of the tokens from `first` to before `stop`. `lse`: over all that a query sees."""
        n_kv, of_kv = len(k), q.shape[1] // len(k)
        found = []
        for kv in range(n_kv):
            own = slice(kv * of_kv, (kv + 1) * of_kv)
            scores = sm_scale * (q[:, own] @ k[kv, first:stop].mT).float()
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            weights = (scores - lse[:, own, None]).exp()
            query, head, token = (weights >= LEAST).nonzero(as_tuple=True)
            weight = weights[query, head, token]
            found.append((query, kv * of_kv + head, first + token, weight))
        return cls(*(torch.cat(parts) for parts in zip(*found, strict=True)), q.shape[1])

    @property
    def mass(self) -> Float[Tensor, " Hq"]:
        """The attention that they hold, added over the queries."""
        return self._by_head(self.weight)

    def lost(
        self, tokens: Int[Tensor, "Hkv rows"], starts: Int[Tensor, "n H R"],
        lengths: Int[Tensor, "n H R"],
    ) -> Float[Tensor, " Hq"]:  # fmt: skip
        """Of `mass`, what those hold that no range visits. `tokens`: which one each row holds; H
        is one for each KV head or each query head."""
        row_of = tokens.long().argsort(-1)  # each token is in one row
        row = row_of[self.head * len(tokens) // self.n_heads, self.token]
        head = self.head * starts.shape[1] // self.n_heads
        left = torch.ones_like(self.weight, dtype=torch.bool)
        for part in torch.arange(len(row), device=row.device).split(
            max(1, AT_ONCE // max(1, starts.shape[2]))
        ):
            at = self.query[part], head[part]
            beyond = row[part, None] - starts[at]
            left[part] = ~((beyond >= 0) & (beyond < lengths[at])).any(-1)
        return self._by_head(self.weight * left)

    def _by_head(self, values: Float[Tensor, " m"]) -> Float[Tensor, " Hq"]:
        return torch.zeros(self.n_heads, device=values.device).index_add_(0, self.head, values)
