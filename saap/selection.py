"""The ranges of one decode step, in tensors that are written over from step to step."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saap.index.lists import offsets_of, sizes_of

from .budget import Budget
from .ranges import best_ranges
from .routing import LayerRouting

LOCAL = 2  # the ranges that every query visits: sinks and tail


class StepRanges:
    """`starts, lengths [B, H, R]` int32 of all that a step visits: sinks, tail, chosen lists.

    The offsets of the lists are counted at every flush, not at every step.
    """

    def __init__(self, n_sink: int, like: Float[Tensor, "B Hkv capacity D"]):
        self.n_sink, self.batch, self.n_kv = n_sink, *like.shape[:2]
        self.device = like.device
        self.offsets = self.sizes = None
        self.most_lists = 0
        self._starts = self._lengths = self._last = None
        self._whole = torch.zeros(
            2, self.batch, self.n_kv, 1, dtype=torch.int32, device=self.device
        )

    @property
    def nbytes(self) -> int:
        held = (self.offsets, self.sizes, self._starts, self._lengths, self._whole)
        return sum(t.nbytes for t in held if t is not None)

    def recount(
        self,
        buckets: Int[Tensor, "B Hkv capacity"],
        tokens: Int[Tensor, "B Hkv capacity"],
        middles: list[int],
        routing: LayerRouting | None,
    ) -> None:
        """Offsets of the lists over the rows of the middle, after rows were put into buckets."""
        if routing is None or not any(middles):
            return
        shape = (self.batch, self.n_kv, routing.n_lists)
        counts = torch.zeros(shape, dtype=torch.int32, device=self.device)
        for b, n in enumerate(middles):
            middle = slice(self.n_sink, self.n_sink + n)
            place = tokens[b, :, middle] - self.n_sink
            own = routing.lists_of(buckets[b, :, middle], place, n)
            counts[b] = sizes_of(own, routing.n_lists)
        self.sizes, self.offsets = counts, offsets_of(counts)
        self._smallest = counts.masked_fill(counts == 0, torch.iinfo(torch.int32).max)
        self._smallest = self._smallest.sort(-1).values.long().cumsum(-1)
        self._bounds: dict[int, int] = {}
        self._starts = None

    def dense(self, lengths: list[int]) -> tuple[Tensor, Tensor]:
        """One range a sequence: everything."""
        starts, counts = self._whole
        _set_by_sequence(counts[..., 0], lengths)
        self._last = counts
        return starts, counts

    def selected(
        self,
        lengths: list[int],
        middles: list[int],
        routing: LayerRouting,
        q_derope: Float[Tensor, "B Hq D"],
        budget: Budget,
    ) -> tuple[Tensor, Tensor]:
        """Sinks and tail, and the lists that `routing` finds best for the queries."""
        by_row = routing.ranks_by_row(budget)
        scores = routing.scores(
            q_derope,
            self.sizes,
            _by_sequence(middles, self.device),
            _by_sequence([n - 1 - self.n_sink for n in lengths], self.device),
            share=budget.share,
            per_row=by_row,
        )
        most = self._bound(routing.n_lists, budget)
        shape = (*scores.shape[:2], LOCAL + most)
        if self._starts is None or self._starts.shape != shape:
            self._starts = torch.zeros(shape, dtype=torch.int32, device=self.device)
            self._lengths = torch.zeros_like(self._starts)
            _set_by_sequence(self._starts[..., 1], [self.n_sink + m for m in middles])
        chosen, _ = best_ranges(
            scores,
            self.offsets,
            nprobe=most,
            max_tokens=budget.max_tokens,
            top_p=budget.top_p,
            min_score=budget.min_weight,
            per_row=by_row,
            first_row=self.n_sink,
            out=(self._starts[..., LOCAL:], self._lengths[..., LOCAL:]),
        )
        sinks = [min(n, self.n_sink) for n in lengths]
        tails = [n - m - s for n, m, s in zip(lengths, middles, sinks, strict=True)]
        for b, n in enumerate(lengths):
            if n <= budget.dense_below:  # beside longer ones: visited whole, as it would be alone
                self._lengths[b, :, LOCAL:] = 0
                sinks[b], tails[b] = n, 0
        _set_by_sequence(self._lengths[..., 0], sinks)
        _set_by_sequence(self._lengths[..., 1], tails)
        used = LOCAL + chosen.shape[2]
        self._last = self._lengths[..., :used]
        return self._starts[..., :used], self._last

    def _bound(self, n_lists: int, budget: Budget) -> int:
        """The most lists that the budget can reach: no more ranges are sorted or carried along."""
        most = n_lists if budget.nprobe is None else min(budget.nprobe, n_lists)
        if budget.max_tokens is None:
            return most
        if budget.max_tokens not in self._bounds:
            reached = (self._smallest < budget.max_tokens).sum(-1).max()
            self._bounds[budget.max_tokens] = min(n_lists, int(reached) + 1)
        return min(most, self._bounds[budget.max_tokens])

    def visited_share(self, lengths: list[int]) -> float:
        if self._last is None:
            return 1.0
        visited = self._last.sum(-1).float().mean(1)
        held = torch.tensor(lengths, device=self.device).clamp(min=1)
        return float((visited / held).mean())


def _set_by_sequence(target: Int[Tensor, "B H"], values: list[int]) -> None:
    if len(set(values)) == 1:
        target.fill_(values[0])
    else:
        target.copy_(torch.tensor(values, dtype=torch.int32).unsqueeze(1))


def _by_sequence(values: list[int], device: torch.device) -> int | Int[Tensor, " B"]:
    return values[0] if len(set(values)) == 1 else torch.tensor(values, device=device)
