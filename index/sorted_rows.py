"""The rows of an index: for each head, rows in the order of their lists, then pending rows."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .lists import bucket_of_row, offsets_of, sizes_of
from .rows import BucketRows, merged_order


class SortedRows:
    """One sequence of `BucketRows`, and where its lists begin: `offsets [H, nlist + 1]` int32.

    The first `n_sorted` rows are in the order of their lists, in order of addition within a list;
    the other `n_pending`, the same ones for each head, have no list yet. `second [H, n_sorted]`
    int32 is the second list of each sorted row when keys spill. The tensors may belong to
    something else: a mapped file, whose pages are copied when they are written, or a KV store.
    """

    def __init__(
        self,
        vectors: Float[Tensor, "H n D"],
        positions: Int[Tensor, "H n"],
        offsets: Int[Tensor, "H nlist_plus_1"],
        second: Int[Tensor, "H n"] | None = None,
        lists: Int[Tensor, "H n"] | None = None,
    ):
        """Use sorted rows that exist already; `lists` follow from `offsets` if not given."""
        n = vectors.shape[1]
        if lists is None:
            lists = bucket_of_row(offsets, n).int()
        self.buffers = BucketRows.over({"vectors": vectors[None]}, lists[None], positions[None])
        self.offsets, self.second = offsets, second
        self.n_sorted, self.n_pending = n, 0
        self._highest: int | None = None

    @classmethod
    def empty(
        cls,
        n_kv: int,
        dim: int,
        nlist: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        spill: bool,
    ) -> "SortedRows":
        def zeros(*shape, dtype):
            return torch.zeros(n_kv, *shape, dtype=dtype, device=device)

        return cls(
            zeros(0, dim, dtype=dtype),
            zeros(0, dtype=torch.int64),
            zeros(nlist + 1, dtype=torch.int32),
            zeros(0, dtype=torch.int32) if spill else None,
        )

    @property
    def nlist(self) -> int:
        return self.offsets.shape[1] - 1

    @property
    def n_rows(self) -> int:
        return self.n_sorted + self.n_pending

    @property
    def vectors(self) -> Float[Tensor, "H n D"]:
        return self.buffers.vectors["vectors"][0, :, : self.n_rows]

    @property
    def positions(self) -> Int[Tensor, "H n"]:
        return self.buffers.tokens[0, :, : self.n_rows]

    @property
    def lists(self) -> Int[Tensor, "H n_sorted"]:
        return self.buffers.lists[0, :, : self.n_sorted]

    @property
    def highest(self) -> int:
        """The highest position; -1 when there are no rows."""
        if self._highest is None:
            self._highest = int(self.positions[0].max()) if self.n_rows else -1
        return self._highest

    @property
    def nbytes(self) -> int:
        second = 0 if self.second is None else self.second.nbytes
        return self.buffers.nbytes + self.offsets.nbytes + second

    def append(self, vectors: Float[Tensor, "H n D"], positions: Int[Tensor, " n"]) -> None:
        """Add rows that have no list yet."""
        start, n = self.n_rows, vectors.shape[1]
        self.buffers.reserve(start + n, vectors[None], start)
        self.buffers.write(0, start, (vectors,), -1, positions)
        self._highest = max(self.highest, int(positions.max()))
        self.n_pending += n

    def merge(
        self, lists: Int[Tensor, "H n_pending"], second: Int[Tensor, "H n_pending"] | None
    ) -> None:
        """Put the pending rows into their lists, behind the rows that the lists hold already."""
        n = self.n_rows
        self.buffers.lists[0, :, self.n_sorted : n] = lists
        order = merged_order(self.buffers.lists[0, :, :n], self.n_sorted)
        if second is not None:
            self.second = torch.cat([self.second, second.int()], 1).gather(1, order)
        self.buffers.permute(0, 0, order, n_kept=self.n_sorted)
        self.offsets = self.offsets + offsets_of(sizes_of(lists, self.nlist))
        self.n_sorted, self.n_pending = n, 0

    def keep(self, kept: Bool[Tensor, "H n"], n_pending: int) -> None:
        """Keep only the rows of `kept`, of which `n_pending` are pending rows.

        Raises ValueError when heads would keep different numbers of rows.
        """
        counts = kept.sum(1).tolist()
        if len(set(counts)) > 1:
            raise ValueError(f"all heads must hold the same positions; got {counts} to keep")
        left = kept.nonzero()[:, 1].view(len(kept), -1)
        n_sorted = left.shape[1] - n_pending
        if self.second is not None:
            self.second = self.second.gather(1, left[:, :n_sorted])
        self.buffers.permute(0, 0, left)
        self.n_sorted, self.n_pending = n_sorted, n_pending
        self.offsets = offsets_of(sizes_of(self.lists, self.nlist))
        self._highest = None
