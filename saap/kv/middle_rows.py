"""Which rows of a store its selector chooses from, and in what order they lie."""

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from saap.budget import Budget
from saap.index.rows import BucketRows, merged_order
from saap.selector import Middle, Selector

from .file_rows import FileRows
from .pending import PendingLists


class MiddleRows:
    """The middle of each sequence: rows between the sinks and the window, in the order of lists.

    Tokens that have left the window are *due*, some at a time, as the budget's `flush_every` says.
    A selector of None chooses from nothing.
    """

    def __init__(self, rows: BucketRows | FileRows, selector: Selector | None, budget: Budget):
        self.rows, self.selector, self.budget = rows, selector, budget
        self.counts: list[int] = []  # rows in the middle, of each sequence
        self.reordered = False  # whether they are in an order that the selector asked for
        self._pending = PendingLists(selector)
        self._seen: tuple[tuple | None, Middle | None] = (None, None)

    @property
    def nbytes(self) -> int:
        return self._pending.nbytes

    @property
    def seen(self) -> Middle:
        """The rows as the selector sees them."""
        rows, first = self.rows, self.budget.n_sink
        buffers = rows.vectors["k"], rows.lists, rows.tokens, self.counts
        held, middle = self._seen
        if held is not None and all(a is b for a, b in zip(held, buffers, strict=True)):
            return middle
        parts = (t[:, :, first:] for t in buffers[:3])
        if isinstance(rows, FileRows):  # nothing holds on to what is mapped
            return Middle(*parts, self.counts, first, self._read_keys)
        middle = Middle(*parts, self.counts, first)
        self._seen = buffers, middle  # made anew only when rows found another place
        return middle

    def _read_keys(self, b: int, first: int, last: int) -> Shaped[Tensor, "Hkv n width"]:
        return self.rows.read_keys(first, last)

    def let_go(self) -> None:
        """Of what holds on to rows that will lie elsewhere."""
        self._seen = None, None

    def begin(self, batch: int) -> None:
        self.counts = [0] * batch

    def restore(self, counts: list[int]) -> None:
        """As saved: so many rows of each sequence lie in the order that the selector wants."""
        selector = self.selector
        self.counts = counts
        self.reordered = (
            selector is not None and selector.assigns_by is None and not selector.keeps_order
        )

    def of_new(
        self, k_rope: Tensor, k_derope: Tensor, new: list[int], lengths: list[int]
    ) -> Tensor | int:
        """Lists of tokens that come now behind `lengths` others, as `PendingLists.lists_of`."""
        return self._pending.lists_of(k_rope, k_derope, new, self.rows, lengths)

    def assign(self, lengths: list[int]) -> None:
        """Every token has the number of its list."""
        self._pending.assign(self.rows, lengths)

    def due(self, length: int) -> int:
        """How many rows the middle holds when a sequence has grown to this length."""
        if self.selector is None or not self.selector.ready:
            return 0
        return self.budget.rows_in_lists(length)

    def overdue(self, lengths: list[int], *, at_step: bool) -> list[int]:
        """How many rows of each sequence are to join the middle now.

        `at_step`: a decode step asks; a selector that waits is built then.
        """
        none = [0] * len(lengths)
        if self.selector is None or not self.selector.ready:
            return none
        if self.selector.waits and not at_step:
            return none
        follows, least = self.selector.follows, self.selector.least_rows
        held = list(zip(lengths, self.counts, strict=True))
        due = [max(0, self.due(n) - m) if follows or m == 0 else 0 for n, m in held]
        return [n if m or n >= least else 0 for n, (_, m) in zip(due, held, strict=True)]

    def insert(self, counts: list[int], lengths: list[int]) -> None:
        """The oldest rows of the tails, so many of each, go behind the others of their lists.

        `reindex` follows.
        """
        self.assign(lengths)
        first = self.budget.n_sink
        for b, n_new in enumerate(counts):
            old = self.counts[b]
            if n_new and self.selector.assigns_by is not None:
                lists = self.rows.lists[b, :, first : first + old + n_new]
                self.rows.permute(b, first, merged_order(lists, old), n_kept=old)
            self.counts[b] = old + n_new

    def reindex(self) -> None:
        """Tell the selector that the middle is another, and keep rows in the order it asks for."""
        first = self.budget.n_sink
        if self.reordered:  # a selector that orders rows itself is shown them in time order
            for b, n in enumerate(self.counts):
                order = self.rows.tokens[b, :, first : first + n].argsort(dim=1)
                self.rows.permute(b, first, order)
        orders = self.selector.update(self.seen)
        for b, order in enumerate(orders or ()):
            self.rows.permute(b, first, order)
        self.reordered = orders is not None

    def truncate(self, lengths: list[int], left: list[int]) -> bool:
        """Only so many tokens of each sequence stay; the window before them is whole again.

        Whether the middle is another now, so that `reindex` has to follow.
        """
        if not self._pending.dropped([n - m for n, m in zip(lengths, left, strict=True)]):
            self.assign(lengths)  # else they go before they have a list, as drafts do
        before = list(self.counts)
        for b, n in enumerate(left):
            if n - self.budget.n_sink - self.counts[b] < self.budget.window:
                self._lay_out(b, lengths[b], n)
        return self.counts != before

    def _lay_out(self, b: int, length: int, left: int) -> None:
        """The order of rows as if the sequence had never been longer than what is left."""
        first, n_middle = self.budget.n_sink, min(self.counts[b], self.due(left))
        if n_middle == self.counts[b]:
            return
        if not self.selector.follows:
            n_middle = 0  # its next step is its first one
        self.counts[b] = n_middle
        if self.rows.plain:
            return
        used = slice(first, length)
        tokens, lists = self.rows.tokens[b, :, used].long(), self.rows.lists[b, :, used].long()
        in_lists = tokens < first + n_middle
        key = torch.where(in_lists, lists * length, (lists.max() + 1) * length) + tokens
        self.rows.permute(b, first, key.argsort(dim=1))

    def select_sequences(self, chosen: Int[Tensor, " B"]) -> None:
        """Sequence i is what `chosen[i]` was. Its rows are already; `reindex` follows."""
        self.counts = [self.counts[i] for i in chosen.tolist()] if self.counts else []
        self._pending.let_go()
        if self.selector is not None:
            self.selector.select_sequences(chosen)
