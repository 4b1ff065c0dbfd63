"""The ranges of one decode step, in tensors that are written over from step to step."""

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from saap.selector import Middle, RangeBuffer, Ranges, check_ranges

LOCAL = 2  # the ranges that every query visits: sinks and tail

AllRanges = tuple[Int[Tensor, "n H all"], Int[Tensor, "n H all"]]


class StepRanges:
    """`starts, lengths [n, H, R]` int32 of all that a step visits: sinks, tail, chosen rows."""

    def __init__(self, n_sink: int):
        self.n_sink = n_sink
        self.room = RangeBuffer(LOCAL)
        self._whole: AllRanges | None = None
        self._local: AllRanges | None = None
        self._written: tuple[Tensor, list[int], list[int]] | None = None
        self._last: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.room.nbytes + sum(
            t.nbytes for t in (*(self._whole or ()), *(self._local or ()))
        )

    def forget(self) -> None:
        """The middle has changed: where it begins and ends is to be written anew."""
        self._written = None

    def empty(self) -> None:
        """Nothing was visited of what comes now."""
        self._written = self._last = None

    def check(self, chosen: Ranges, middle: Middle) -> None:
        check_ranges(*chosen, middle.n_rows, middle.first_row)

    def complete(
        self,
        chosen: Ranges | None,
        lengths: list[int],
        middles: list[int],
        dense_below: int,
        n_queries: int,
        k: Shaped[Tensor, "B Hkv capacity width"],
    ) -> AllRanges:
        """Sinks and tail before the chosen ranges; everything where nothing was chosen.

        Sequences of at most `dense_below` tokens are visited whole beside longer ones, as they
        would be alone.
        """
        if chosen is None:
            return self._dense(lengths, n_queries, k)
        starts, counts = chosen
        kept = self.room.holds(starts)
        if kept:
            all_starts, all_counts = self.room.starts, self.room.lengths
        else:
            shape = (*starts.shape[:2], LOCAL)
            local = torch.zeros(shape, dtype=torch.int32, device=starts.device)
            all_starts = torch.cat([local, starts], -1)
            all_counts = torch.cat([local, counts], -1)
        sinks, tails = self._local_rows(lengths, middles)
        for b, n in enumerate(lengths):
            if n <= dense_below:
                all_counts[b, :, LOCAL:] = 0
                sinks[b], tails[b] = n, 0
        if not (kept and self._holds(all_starts, middles, sinks)):  # what hardly ever changes
            _set_by_sequence(all_starts[..., 1], [self.n_sink + m for m in middles])
            _set_by_sequence(all_counts[..., 0], sinks)
            self._written = (all_starts, list(middles), sinks) if kept else None
        _set_by_sequence(all_counts[..., 1], tails)
        if kept and starts is self.room.taken[0]:
            self._last = all_counts
            return all_starts, all_counts
        used = LOCAL + starts.shape[2]
        self._last = all_counts[..., :used]
        return all_starts[..., :used], self._last

    def growing(self, local: bool) -> list[Tensor]:
        """Of the ranges written last, the numbers of rows of those that one token more makes
        longer by one; with `local`, of sinks and tail alone, too."""
        tail = 0 if self._last.shape[2] == 1 else 1
        own = [self._last[..., tail]]
        return [*own, self._local[1][..., 1]] if local else own

    def local(
        self, lengths: list[int], middles: list[int], n_queries: int, k: Tensor
    ) -> AllRanges:
        """Sinks and tail alone."""
        shape = (n_queries, k.shape[1], LOCAL)
        if self._local is None or self._local[0].shape != shape:
            self._local = tuple(torch.zeros(2, *shape, dtype=torch.int32, device=k.device))
        starts, counts = self._local
        sinks, tails = self._local_rows(lengths, middles)
        _set_by_sequence(starts[..., 1], [self.n_sink + m for m in middles])
        _set_by_sequence(counts[..., 0], sinks)
        _set_by_sequence(counts[..., 1], tails)
        return self._local

    def _local_rows(self, lengths: list[int], middles: list[int]) -> tuple[list[int], list[int]]:
        """How many rows of each sequence are sinks, and how many are its tail."""
        sinks = [min(n, self.n_sink) for n in lengths]
        tails = [n - m - s for n, m, s in zip(lengths, middles, sinks, strict=True)]
        return sinks, tails

    def _holds(self, all_starts: Tensor, middles: list[int], sinks: list[int]) -> bool:
        """Whether this very tensor, which another budget replaces, has been written to so."""
        written = self._written
        return written is not None and written[0] is all_starts and written[1:] == (middles, sinks)

    def _dense(self, lengths: list[int], n_queries: int, k: Tensor) -> AllRanges:
        """One range per sequence: everything."""
        shape = (n_queries, k.shape[1], 1)
        if self._whole is None or self._whole[0].shape != shape:
            self._whole = tuple(torch.zeros(2, *shape, dtype=torch.int32, device=k.device))
        starts, counts = self._whole
        _set_by_sequence(counts[..., 0], lengths)
        self._last = counts
        return starts, counts

    def visited_rows(self, lengths: list[int]) -> float:
        if self._last is None:
            return sum(lengths) / max(1, len(lengths))
        return float(self._last.sum(-1).float().mean())

    def rows_read(self, lengths: list[int], n_kv: int) -> float:
        """Rows per sequence, added over the heads that read them."""
        heads = n_kv if self._last is None else self._last.shape[1]
        return self.visited_rows(lengths) * heads

    def visited_share(self, lengths: list[int]) -> float:
        if self._last is None:
            return 1.0
        visited = self._last.sum(-1).float().mean(1)
        held = torch.tensor(lengths, device=visited.device).clamp(min=1)
        return float((visited / held).mean())


def _set_by_sequence(target: Int[Tensor, "n H"], values: list[int]) -> None:
    if len(set(values)) == 1:
        target.fill_(values[0])
    else:
        target.copy_(torch.tensor(values, dtype=torch.int32).unsqueeze(1))
