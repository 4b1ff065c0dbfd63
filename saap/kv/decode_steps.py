"""Steps of one token over the rows of a store: rows are chosen, attended, and the rest estimated.

What a step found out is kept for the next one, which is mostly like it.
"""

import functools
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saap.budget import Budget
from saap.kernels.attention.int8_rows import stored_as
from saap.kernels.rest import Moments, PreparedRest
from saap.selector import Query, Ranges, Selector

from .file_rows import FileRows
from .middle_rows import MiddleRows
from .next_step import NextStep, steps_left
from .ranges import LOCAL, AllRanges, StepRanges
from .rest import RestOfRows
from .steps import StepAttention


class DecodeSteps:
    """What one query for each sequence visits, and attention over it.

    Args:
        lists: the rows of the store, and which of them are the middle.
        selector: what chooses rows; None: steps visit everything.
        n_sink: how many first tokens every step visits.
        kv_dtype: as for a `KVStore`.
        checked: whether a selector's ranges are checked at every step.
    """

    def __init__(
        self,
        lists: MiddleRows,
        selector: Selector | None,
        n_sink: int,
        kv_dtype: torch.dtype | None,
        *,
        checked: bool,
    ):
        self._lists, self._rows = lists, lists.rows
        self._selector = selector
        self._as_stored = functools.partial(stored_as, dtype=kv_dtype)
        self._checks = checked
        self.ranges = StepRanges(n_sink)
        self._attention = StepAttention(self.ranges)
        self.rest = RestOfRows(self._rows, n_sink)
        self._writes = True  # whether a step writes the row of its token
        self.estimated: Moments | None = None
        """What the last step estimated the rows from that it left out; None if it did not."""
        self._adds: PreparedRest | None = None
        self._next: NextStep | None = None

    def share(self, rest: RestOfRows) -> None:
        """The rows, and what is summed up of them, are another store's, which writes them."""
        self.rest, self._writes = rest, False

    @property
    def nbytes(self) -> int:
        return self.ranges.nbytes + self.rest.nbytes

    def bytes_read(self, lengths: list[int]) -> float:
        """Of the last step, for each sequence."""
        n_kv = self._rows.vectors["k"].shape[1]
        choosing = 0 if self._selector is None else self._selector.nbytes
        rest = 0 if self.estimated is None else self.estimated.nbytes
        return self.ranges.rows_read(lengths, n_kv) * self.row_bytes + choosing + rest

    @property
    def row_bytes(self) -> int:
        """Of a row's key and value; once, if these are one vector."""
        k, v = self._rows.vectors["k"], self._rows.vectors["v"]
        return k.shape[-1] * k.element_size() * (1 if v is k else 2)

    def changed(self) -> None:
        """Rows come or go, so the next step is not like the last."""
        self._next = None

    def moved(self) -> None:
        """Rows will lie elsewhere."""
        self.changed()
        self._attention.forget()

    def reindexed(self) -> None:
        """The middle is another."""
        self.changed()
        self.ranges.forget()

    def emptied(self) -> None:
        """There are no tokens any more."""
        self.changed()
        self.ranges.empty()

    def chooses(self, lengths: list[int], budget: Budget) -> bool:
        """Whether a step leaves rows out."""
        some = self._selector is not None and any(self._lists.counts)
        return some and max(lengths, default=0) > budget.dense_below

    def select(
        self,
        q_rope: Float[Tensor, "n Hq D"],
        q_derope: Float[Tensor, "n Hq D"],
        lengths: list[int],
        budget: Budget,
        *,
        positions: Int[Tensor, " n"] | None = None,
        local_lse: Float[Tensor, "n Hq"] | None = None,
        impl: str | None = None,
    ) -> AllRanges:
        """As `KVStore.select`, of sequences of these lengths."""
        self._next = None  # it relies on ranges that are written over here
        chosen, self._attention.latest_local = None, None
        if self.chooses(lengths, budget):
            # Triton's kernels are of attention alone.
            impl = None if impl == "triton" else impl
            if positions is None:
                positions = [n - 1 for n in lengths]
            about = self._rows, q_rope, lengths, self._lists.counts
            ways = self._attention.local_lse, self._attention.local
            local = [functools.partial(way, *about) for way in ways]
            if local_lse is not None:
                local = [lambda *_: local_lse, None]
            query = Query(q_rope, q_derope, positions, impl, *local)
            middle = self._lists.seen
            chosen = self._selector.select(query, middle, budget, self.ranges.room)
            if self._checks:
                self.ranges.check(chosen, middle)
        return self.with_local(chosen, lengths, budget.dense_below, len(q_rope))

    def local_lse(
        self, q_rope: Tensor, lengths: list[int], sm_scale: float, softcap: float | None
    ) -> Float[Tensor, "n Hq"]:
        """As `KVStore.local_lse`, of sequences of these lengths."""
        return self._attention.local_lse(
            self._rows, q_rope, lengths, self._lists.counts, sm_scale, softcap
        )

    def with_local(
        self, chosen: Ranges | None, lengths: list[int], dense_below: int, n_queries: int
    ) -> AllRanges:
        """As `KVStore.with_local`."""
        return self.ranges.complete(
            chosen, lengths, self._lists.counts, dense_below, n_queries, self._rows.vectors["k"]
        )

    def attend(
        self,
        q_rope: Float[Tensor, "B Hq 1 D"],
        q_derope: Float[Tensor, "B Hq 1 D"],
        lengths: list[int],
        budget: Budget,
        *,
        sm_scale: float,
        softcap: float | None,
        impl: str | None = None,
    ) -> tuple[Float[Tensor, "B Hq D"], Float[Tensor, "B Hq"], PreparedRest | None]:
        """`out`, `lse`, and what has added the estimated rest, if something has."""
        q, qd = q_rope[:, :, 0], q_derope[:, :, 0]
        chosen = self.select(q, qd, lengths, budget, impl=impl)
        out, lse = self._attention.attend(
            self._rows, q, *chosen, sm_scale=sm_scale, softcap=softcap, impl=impl
        )
        add = self.adds_rest(budget, lengths, chosen[1], sm_scale, softcap)
        if add is not None:
            out, lse = add(out, lse, q)
        return out, lse, add

    def adds_rest(
        self,
        budget: Budget,
        lengths: list[int],
        counts: Int[Tensor, "n H R"],
        sm_scale: float,
        softcap: float | None,
    ) -> PreparedRest | None:
        """As `KVStore.adds_rest`, of sequences of these `lengths` and ranges of these `counts`."""
        self.estimated = None
        if not (budget.estimate_rest and self.chooses(lengths, budget) and softcap is None):
            return None
        if not self._selector.visits_best:
            return None
        left_out = [n > budget.dense_below for n in lengths]
        self.estimated = self.rest.moments(self._lists.counts, left_out)
        counts, moments = counts[..., LOCAL:], self.estimated
        if len(counts) != len(lengths):
            moments = moments.expand(len(counts))
        layer = self._selector.layer
        options = {
            "sm_scale": sm_scale, "max_tokens": budget.max_tokens,
            "min_weight": budget.least_weight(layer.number),
            "scored": self._selector.left_out if sm_scale == layer.sm_scale else None,
        }  # fmt: skip
        if self._adds is None or not self._adds.fits(moments, counts, **options):
            self._adds = PreparedRest(moments, counts, **options)
        return self._adds

    def next_for(self, q: Tensor, k: Tensor, v: Tensor, terms: dict) -> NextStep | None:
        """The step that was prepared, if it is that of these tensors on these terms."""
        step = self._next
        return step if step is not None and step.fits(q, k, v, terms) else None

    def keep(self, step: NextStep) -> None:
        """It is done, and so may be the next one."""
        self._next = step

    def prepare(
        self,
        q_rope: Float[Tensor, "B Hq 1 D"],
        lengths: list[int],
        budget: Budget,
        new_dtype: torch.dtype,
        add: PreparedRest | None,
        terms: dict,
        *,
        resting: bool,
    ) -> None:
        """Prepare the next step, after one of these queries, where that can be done.

        `new_dtype`: of keys and values as they come. `terms`: what steps must have in common to be
        alike, beside their tensors.
        """
        attend = self._attention.latest
        if attend is None or isinstance(self._rows, FileRows) or not self._rows.plain:
            return
        if add is not None:
            attend = add.after(attend)
        choose = None
        if self.chooses(lengths, budget):
            choose = self._selector.again(self._attention.latest_local)
            least = max(budget.n_sink, budget.dense_below + 1)
            if choose is None or min(lengths) < least:
                return
            if self._checks:
                choose = self._checked(choose)
        middles = self._lists.counts
        steps = steps_left(
            None if resting else self._selector, lengths, self._rows.capacity,
            lambda b, n: self._lists.due(n) > middles[b],
        )  # fmt: skip
        if choose is None and self._selector is not None and any(middles):
            steps = min(steps, budget.dense_below - max(lengths))
        k, v = self._rows.vectors["k"], self._rows.vectors["v"]
        growing = self.ranges.growing(local=self._attention.latest_local is not None)
        self._next = NextStep(
            (k, v), self._as_stored, new_dtype, growing, choose, attend, q_rope.shape,
            q_rope.dtype, terms, steps, writes=self._writes,
        )  # fmt: skip

    def _checked(self, choose: Callable[[Tensor], Ranges]) -> Callable[[Tensor], None]:
        middle = self._lists.seen
        return lambda q: self.ranges.check(choose(q), middle)
