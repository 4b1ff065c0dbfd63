"""Choice by codes over the ranks of a group: what a single process would choose (`saap.methods`).

Coordinates are learned from sums over all ranks. Candidates, and the rows among them, are the
largest of all ranks (`choice.among_largest`), each rank scoring its own.
"""

import functools

import torch
from torch import Tensor

from saap.budget import Budget
from saap.index.moments import Sums, Toward
from saap.kernels.codes import coarse_scores, codes_of_rows, weigh_rows
from saap.kernels.rest import Scored
from saap.methods.saap import GROWTH, SaapSelector
from saap.selector import Middle, Ranges

from .choice import among_largest
from .group import Group

NOTHING = torch.finfo(torch.float32).min
"""The largest score of no rows: finite, so that differences are numbers."""


class SplitSelector(SaapSelector):
    """Codes of the rows that this rank holds, chosen from together with those of the others."""

    def __init__(self, selector: SaapSelector, group: Group):
        super().__init__(selector.layer, selector.method, selector.trained)
        self.group = group

    def check_budget(self, budget):
        if budget.min_weight is not None:
            raise ValueError(
                "min_weight must be None in a split context, whose ranks choose a number of rows "
                f"together; got {budget.min_weight}"
            )
        super().check_budget(budget)

    def _learn(self, middle: Middle) -> None:
        """`learn_together` has learned before rows are coded."""

    def learn_together(self, middle: Middle | None, n: int, n_kv: int) -> None:
        """Coordinates of the n rows that all ranks hold, as one process would learn them.

        `middle` is this rank's part, None where it has no rows. Every rank calls it at the same
        step; `update` with the new rows follows, and codes all where coordinates are new.
        """
        if self.trained is not None or n < GROWTH * self.learned_from.get(0, 0):
            return
        self._learn_from(0, n, functools.partial(self._sums_over_ranks, middle, n_kv), None)
        self.n_coded = []
        self._put_together(1)

    def _sums_over_ranks(self, middle: Middle | None, n_kv: int, toward: Toward | None) -> Sums:
        if middle is not None:
            sums = self.sums_of_keys(middle, 0, toward)
        else:
            like = self.recent[0].sums.total if 0 in self.recent else self.observed[0][0]
            sums = Sums.zeros(n_kv, like.shape[-1], like.device)
        flat = self.group.add(torch.cat([part.flatten() for part in sums.parts]))
        each = flat.split([part.numel() for part in sums.parts])
        shapes = [part.shape for part in sums.parts]
        return Sums(*(own.view(shape) for own, shape in zip(each, shapes, strict=True)))

    def select_together(
        self,
        q_rope: Tensor,
        local_lse: Tensor | None,
        middle: Middle | None,
        n: int,
        budget: Budget,
        impl: str | None,
    ) -> Ranges | None:
        """`starts, lengths [1, H, R]` of this rank's rows of one query `[1, Hq, D]`.

        `local_lse [1, Hq]`: of the scores with sinks and tail that this rank holds, if it has
        any. They are those that `SaapSelector.select` would choose of all n rows, but for equal
        weights within rounding. None where this rank has no rows. Every rank calls it at the same
        step.
        """
        held = 0 if middle is None else middle.n_rows[0]
        q, mapped = q_rope[0].float(), self.query_map(q_rope)[0]
        n_kv = self.coordinates.of_queries.shape[1]
        heads = n_kv if budget.share == "group" else len(q)
        q, mapped = (t.unflatten(0, (heads, -1)) for t in (q, mapped))
        used = torch.ones(heads, held, dtype=torch.bool, device=q.device)
        self.left_out = None
        if budget.max_tokens < n:
            candidates = max(
                budget.max_tokens, self.method.search_options.candidates(budget.max_tokens, n)
            )
            if candidates < n:
                used = self._candidates(q, held, candidates, impl)
            outside = self._beside_middle(q_rope, local_lse).unflatten(0, (heads, -1))
            used = self._best(mapped, outside, used, budget, impl)
        self.n_scanned = float(held)
        return None if middle is None else _as_ranges(used, middle.first_row)

    def _candidates(self, q: Tensor, held: int, k: int, impl: str | None) -> Tensor:
        """`[H, held]`: rows that one of the heads lets through by the coarse code."""
        heads, group, _ = q.shape
        scores = q.new_zeros(heads, group, 0)
        if held:
            scores = coarse_scores(q, self.codes, held, self.query_map, impl)
        let_through = among_largest(scores.flatten(0, 1), None, k, self.group)
        return functools.reduce(torch.logical_or, let_through.view(heads, group, held).unbind(1))

    def _beside_middle(self, q_rope: Tensor, local_lse: Tensor | None) -> Tensor:
        """`[Hq]`: of this rank's sinks and tail. Learned sinks, which all have, count once."""
        none = q_rope.new_full(q_rope.shape[:2], NOTHING, dtype=torch.float32)
        own = none if local_lse is None else local_lse
        if self.group.rank == 0:
            own = self.layer.beside_middle(own)
        return self.coordinates.less_mean(own, q_rope, self.layer.sm_scale)[0]

    def _best(
        self, q: Tensor, outside: Tensor, used: Tensor, budget: Budget, impl: str | None
    ) -> Tensor:
        """`[H, held]`: the rows of those `used` with the largest weights by whole codes, beside
        what is `outside [H, G]` on this rank."""
        rows = [own.nonzero()[:, 0] for own in used]
        longest = max(len(own) for own in rows)
        counts = torch.tensor([len(own) for own in rows], device=q.device)
        real = torch.arange(longest, device=q.device) < counts[:, None]
        codes = codes_of_rows(self.codes, rows) if longest else None
        weights, largest = q.new_zeros(*q.shape[:2], 0), q.new_full(q.shape[:2], NOTHING)
        if longest:
            weights, largest = weigh_rows(q, codes, longest, impl)
        largest = torch.where(counts[:, None] > 0, largest, NOTHING)
        weights = torch.where(real[:, None], weights, 0.0)
        outside = outside.nan_to_num(nan=NOTHING).clamp(min=NOTHING)
        held = torch.stack([largest, weights.sum(-1), outside])
        every = torch.stack(self.group.gather(held))
        most = every[:, 0].amax(0).maximum(every[:, 2].amax(0))
        total = (every[:, 1] * (every[:, 0] - most).exp() + (every[:, 2] - most).exp()).sum(0)
        share = (largest - most).exp() / total
        keys = (weights * share[..., None]).sum(1)
        best = among_largest(keys, real, budget.max_tokens, self.group)
        self.scored = counts[None]
        if budget.estimate_rest:
            top = every[:, 0].amax(0)
            others = torch.where((real & ~best)[:, None], weights, 0.0).sum(-1)
            self.left_out = self._of_all_ranks(others * (largest - top).exp(), top, counts, budget)
        chosen = torch.zeros_like(used)
        for head, own in enumerate(rows):
            chosen[head, own[best[head, : len(own)]]] = True
        return chosen

    def _of_all_ranks(self, others: Tensor, top: Tensor, counts: Tensor, budget: Budget) -> Scored:
        """`others [H, G]`: the weight, over that of `top`, of this rank's rows that were scored
        and not chosen. `counts [H]`: how many it has scored."""
        own = torch.cat([others.flatten().double(), counts.double()])
        others, counts = self.group.add(own).split([others.numel(), len(counts)])
        lse = (top.flatten() + others.log()).float()
        search = self.method.search_options
        n_best, mean = search.of_any_context(budget.max_tokens), self.coordinates.mean
        return Scored(lse[None], mean, counts.round().long()[None], n_best, search.one_of)


def _as_ranges(used: Tensor, first_row: int) -> Ranges:
    """Runs of chosen rows, ascending; what is not used has length 0."""
    head, row = used.nonzero(as_tuple=True)
    begins = torch.ones_like(head, dtype=torch.bool)
    begins[1:] = (row.diff() != 1) | (head.diff() != 0)
    first = begins.nonzero()[:, 0]
    own = head[first]
    counts = torch.bincount(own, minlength=len(used))
    place = torch.arange(len(first), device=used.device) - (counts.cumsum(0) - counts)[own]
    ends = torch.nn.functional.pad(first, (0, 1), value=len(row))
    shape = (2, 1, len(used), int(counts.max()))
    starts, lengths = torch.zeros(shape, dtype=torch.int32, device=used.device)
    starts[0, own, place] = (row[first] + first_row).int()
    lengths[0, own, place] = ends.diff().int()
    return starts, lengths
