"""Keys of single tokens that wait for the numbers of their lists: many are assigned at a time."""

import torch
from torch import Tensor

from saap.index.rows import BucketRows
from saap.selector import Selector

from .file_rows import FileRows

ASSIGNED_AT_ONCE = 2048
PENDING = 256  # single tokens that wait together


class PendingLists:
    """Which lists new rows of a store belong to: at once for many tokens, later for single ones.

    Until then their rows, the last ones of `rows`, have list -1. `lengths`: rows in use of each
    sequence.
    """

    def __init__(self, selector: Selector | None):
        self._selector = selector
        self._keys: Tensor | None = None
        self._waiting = 0

    @property
    def nbytes(self) -> int:
        return 0 if self._keys is None else self._keys.nbytes

    def lists_of(
        self, k_rope: Tensor, k_derope: Tensor, new: list[int], rows: BucketRows | FileRows,
        lengths: list[int],
    ) -> Tensor | int:  # fmt: skip
        """Lists of tokens that come now behind `rows`, `[B, Hkv, T]`; -1 for single ones, which
        wait."""
        selector = self._selector
        if selector is None or not selector.ready or selector.assigns_by is None:
            return 0
        keys = k_rope if selector.assigns_by == "rope" else k_derope
        batch, heads, length, dim = keys.shape
        if length == 1 and min(new) == 1:
            if self._keys is None:
                self._keys = keys.new_empty(batch, heads, PENDING, dim)
            if self._waiting == PENDING:
                self.assign(rows, lengths)
            self._keys[:, :, self._waiting] = keys[:, :, 0]
            self._waiting += 1
            return -1
        self.assign(rows, lengths)
        parts = keys.split(ASSIGNED_AT_ONCE, dim=2)
        return torch.cat([selector.assign(part) for part in parts], 2)

    def assign(self, rows: BucketRows | FileRows, lengths: list[int]) -> None:
        """Nothing waits any more."""
        if self._waiting == 0:
            return
        lists = self._selector.assign(self._keys[:, :, : self._waiting])
        for b, n in enumerate(lengths):
            rows.lists[b, :, n - self._waiting : n] = lists[b]
        self._waiting = 0

    def dropped(self, counts: list[int]) -> bool:
        """Whether so many of the latest tokens of each sequence all waited: they are forgotten."""
        if len(set(counts)) > 1 or counts[0] > self._waiting:
            return False
        self._waiting -= counts[0]
        return True

    def let_go(self) -> None:
        """The batch is another; nothing waits."""
        self._keys = None
