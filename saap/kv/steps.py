"""Attention of one decode step over rows of a store, which a step prepares for the next."""

from jaxtyping import Float, Int
from torch import Tensor

from saap.index.rows import BucketRows
from saap.kernels.attention.api import PreparedRanges, attend_ranges

from .file_rows import FileRows
from .ranges import StepRanges


class StepAttention:
    """`saap.attend_ranges` over the rows of a store, wherever they lie."""

    def __init__(self, ranges: StepRanges):
        self._ranges = ranges
        self.latest: PreparedRanges | None = None
        """Attention of the step before, if it was prepared."""
        self._starts: Tensor | None = None  # of the step before
        self._selected: PreparedRanges | None = None
        self._local: PreparedRanges | None = None
        self.latest_local: PreparedRanges | None = None
        """What `local` gave, if it was asked for since this was set to None."""

    def forget(self) -> None:
        """Rows will lie elsewhere."""
        self._starts = self._selected = self._local = self.latest = self.latest_local = None

    def attend(
        self,
        rows: BucketRows | FileRows,
        q: Float[Tensor, "B Hq D"],
        starts: Int[Tensor, "B H R"],
        lengths: Int[Tensor, "B H R"],
        **options,
    ) -> tuple[Float[Tensor, "B Hq D"], Float[Tensor, "B Hq"]]:
        """`saap.attend_ranges`: `out`, and `lse` float32."""
        self.latest = None
        if isinstance(rows, FileRows):
            return attend_ranges(q, *rows.in_memory(starts, lengths), **options)
        given = q, rows.vectors["k"], rows.vectors["v"], starts, lengths
        again, self._starts = starts is self._starts, starts
        if not (again and starts.is_contiguous()):  # not worth preparing what comes once
            return attend_ranges(*given, **options)
        if self._selected is None or not self._selected.fits(*given, **options):
            self._selected = PreparedRanges(*given, **options)
        self.latest = self._selected
        return self._selected(q)

    def local(
        self,
        rows: BucketRows | FileRows,
        q: Float[Tensor, "n Hq D"],
        lengths: list[int],
        middles: list[int],
        sm_scale: float,
        softcap: float | None,
    ) -> PreparedRanges | None:
        """Attention over what a step visits in any case, prepared for one query of each sequence;
        None for other queries, and for rows in a file."""
        k, v = rows.vectors["k"], rows.vectors["v"]
        self.latest_local = None
        if isinstance(rows, FileRows) or len(q) != len(k):
            return None
        given = q, k, v, *self._ranges.local(lengths, middles, len(q), k)
        options = {"sm_scale": sm_scale, "softcap": softcap}
        if self._local is None or not self._local.fits(*given, **options):
            self._local = PreparedRanges(*given, **options)
        self.latest_local = self._local
        return self._local

    def local_lse(
        self,
        rows: BucketRows | FileRows,
        q: Float[Tensor, "n Hq D"],
        lengths: list[int],
        middles: list[int],
        sm_scale: float,
        softcap: float | None,
    ) -> Float[Tensor, "n Hq"]:
        """Of the scores with what a step visits in any case, for one query of each sequence, or
        any number of one."""
        local = self.local(rows, q, lengths, middles, sm_scale, softcap)
        if local is not None:
            return local(q)[1]
        k, v = rows.vectors["k"], rows.vectors["v"]
        ranges = self._ranges.local(lengths, middles, len(q), k)
        options = {"sm_scale": sm_scale, "softcap": softcap}
        if isinstance(rows, FileRows):
            return attend_ranges(q, *rows.in_memory(*ranges), **options)[1]
        k, v = (t.expand(len(q), *t.shape[1:]) for t in (k, v))
        return attend_ranges(q, k, v, *ranges, **options)[1]
