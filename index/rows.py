"""The rows of an index: vectors and positions of each head in bucket order, then those pending."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .lists import bucket_of_row, offsets_of, sizes_of

GROWTH = 1.25
MOVED_AT_ONCE = 2048


def plain_rows(t: Tensor) -> Tensor | np.ndarray:
    """`t` itself on a GPU; on a CPU a NumPy view: of the bytes of each vector, or of integers.

    One thread of NumPy's gathers rows as fast as torch's do together, and a merge of hundreds of
    small pieces does not wait at each for a core that other work has taken.
    """
    if t.is_cuda:
        return t
    return t.view(torch.uint8).numpy() if t.is_floating_point() else t.numpy()


class BucketRows:
    """`vectors [H, n, D]`, `positions [H, n]` int64 and `offsets [H, nlist + 1]` int32.

    The first `n_sorted` rows are in bucket order, in order of addition within a bucket; the other
    `n_pending`, the same ones for each head, have no bucket yet. `second [H, n_sorted]` int32 is
    the second bucket of each sorted row when keys spill. Buffers are written in place and grow by
    a quarter; buffers that are mapped from a file are copied before the first write.
    """

    def __init__(
        self,
        n_kv: int,
        dim: int,
        nlist: int,
        dtype: torch.dtype,
        device: torch.device,
        spill: bool,
    ):
        self.nlist = nlist
        self.n_sorted = self.n_pending = 0
        self.mapped = False
        self._highest: int | None = -1
        self.offsets = torch.zeros(n_kv, nlist + 1, dtype=torch.int32, device=device)
        self._vectors = torch.empty(n_kv, 0, dim, dtype=dtype, device=device)
        self._positions = torch.empty(n_kv, 0, dtype=torch.int64, device=device)
        self.second = torch.empty(n_kv, 0, dtype=torch.int32, device=device) if spill else None

    @classmethod
    def from_sorted(cls, vectors, positions, offsets, second) -> "BucketRows":
        """Over tensors that may be mapped from a file."""
        heads, n, dim = vectors.shape
        nlist = offsets.shape[1] - 1
        rows = cls(heads, dim, nlist, vectors.dtype, vectors.device, second is not None)
        rows._vectors, rows._positions = vectors, positions
        rows.offsets, rows.second, rows.n_sorted, rows.mapped = offsets, second, n, True
        rows._highest = None
        return rows

    @property
    def n_rows(self) -> int:
        return self.n_sorted + self.n_pending

    @property
    def vectors(self) -> Float[Tensor, "H n D"]:
        return self._vectors[:, : self.n_rows]

    @property
    def positions(self) -> Int[Tensor, "H n"]:
        return self._positions[:, : self.n_rows]

    @property
    def buckets(self) -> Int[Tensor, "H n_sorted"]:
        return bucket_of_row(self.offsets, self.n_sorted)

    @property
    def highest(self) -> int:
        """The highest position; -1 when there are no rows."""
        if self._highest is None:
            self._highest = int(self.positions[0].max()) if self.n_rows else -1
        return self._highest

    @property
    def nbytes(self) -> int:
        held = [self._vectors, self._positions, self.offsets]
        held += [] if self.second is None else [self.second]
        return sum(t.numel() * t.element_size() for t in held)

    def append(self, vectors: Float[Tensor, "H n D"], positions: Int[Tensor, " n"]) -> None:
        """Add rows that have no bucket yet."""
        end = self.n_rows + vectors.shape[1]
        self._make_room(end)
        self._vectors[:, self.n_rows : end] = vectors
        self._positions[:, self.n_rows : end] = positions.to(self._positions.device)
        self._highest = max(self.highest, int(positions.max()))
        self.n_pending += vectors.shape[1]

    def merge(
        self, buckets: Int[Tensor, "H n_pending"], second: Int[Tensor, "H n_pending"] | None
    ) -> None:
        """Put the pending rows into their buckets, behind the rows that are there."""
        everyone = torch.cat([self.buckets, buckets.long()], 1)
        order = everyone.argsort(dim=1, stable=True)
        if second is not None:
            self.second = torch.cat([self.second, second.int()], 1).gather(1, order)
        self._insert(order)
        self._count(everyone)
        self.n_sorted, self.n_pending = self.n_rows, 0

    def keep(self, kept: Bool[Tensor, "H n"], n_pending: int) -> None:
        """Forget the other rows. Each head keeps as many, and `n_pending` of them are pending."""
        left = kept.nonzero()[:, 1].view(len(kept), -1)
        in_buckets = left[:, : left.shape[1] - n_pending]
        buckets = self.buckets.gather(1, in_buckets)
        if self.second is not None:
            self.second = self.second.gather(1, in_buckets)
        self._compact(left)
        self._count(buckets)
        self.n_sorted, self.n_pending = in_buckets.shape[1], n_pending
        self._highest = None

    def _insert(self, order: Int[Tensor, "H n"]) -> None:
        """Sorted rows move back to make room for the pending ones.

        From the last row to the first, a few at a time through a buffer that stays in the cache:
        no second copy of the keys is made, and none is read after it was written over.
        """
        self._make_room(self.n_rows)
        pending = plain_rows(self._vectors[:, self.n_sorted : self.n_rows].clone())
        self._positions[:, : self.n_rows] = self._positions.gather(1, order)
        for vectors, new_ones, rows in zip(
            plain_rows(self._vectors), pending, plain_rows(order), strict=True
        ):
            for stop in range(self.n_rows, 0, -MOVED_AT_ONCE):
                start = max(0, stop - MOVED_AT_ONCE)
                source = rows[start:stop]
                moved = vectors[source]
                is_new = source >= self.n_sorted
                moved[is_new] = new_ones[source[is_new] - self.n_sorted]
                vectors[start:stop] = moved

    def _compact(self, kept_rows: Int[Tensor, "H m"]) -> None:
        """The rows that stay move to the front, in their order."""
        self._make_room(self.n_rows)
        n = kept_rows.shape[1]
        self._positions[:, :n] = self._positions.gather(1, kept_rows)
        for vectors, rows in zip(plain_rows(self._vectors), plain_rows(kept_rows), strict=True):
            for start in range(0, n, MOVED_AT_ONCE):
                source = rows[start : start + MOVED_AT_ONCE]
                vectors[start : start + len(source)] = vectors[source]

    def _count(self, buckets: Int[Tensor, "H n"]) -> None:
        self.offsets = offsets_of(sizes_of(buckets, self.nlist))

    def _make_room(self, n: int) -> None:
        capacity = self._vectors.shape[1]
        if n <= capacity and not self.mapped:
            return
        size = max(n, int(capacity * GROWTH)) if n > capacity else capacity
        for name in ("_vectors", "_positions"):
            old = getattr(self, name)
            new = old.new_empty(old.shape[0], size, *old.shape[2:])
            new[:, : self.n_rows] = old[:, : self.n_rows]
            setattr(self, name, new)
        self.mapped = False
