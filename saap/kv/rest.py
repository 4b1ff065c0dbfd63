"""How the rows that steps leave out are spread: sums that grow with the rows of a store."""

import torch
from jaxtyping import Float
from torch import Tensor

from saap.index.rows import BucketRows
from saap.kernels.attention.int8_rows import dequantize_rows, head_dim
from saap.kernels.rest import Moments

from .file_rows import FileRows

AT_ONCE = 4096
"""Rows that are held as floats at once."""


class RestOfRows:
    """`Moments` of the middle of each sequence, whose rows are in time order.

    Sums are of what rows differ by from the first ones, so that little cancels; rows that are new
    are added when `moments` is asked for.
    """

    def __init__(self, rows: BucketRows | FileRows, n_sink: int):
        self._rows, self._n_sink = rows, n_sink
        self._sums: list[RowSums] = []  # of each sequence
        self._packed: Tensor | None = None
        self._counted: Tensor | None = None  # rows that `_packed` is about, by sequence
        self._held: tuple[list[int], list[bool]] | None = None

    @property
    def nbytes(self) -> int:
        held = 0 if self._packed is None else self._packed.nbytes
        return held + sum(s.nbytes for s in self._sums)

    def moments(self, middles: list[int], left_out: list[bool]) -> Moments:
        """`left_out`: whether a step leaves out rows of that sequence at all."""
        if self._held == (middles, left_out):
            return Moments(self._packed, self._counted)
        k = self._rows.vectors["k"]
        batch, n_kv, dim = len(middles), k.shape[1], head_dim(k)
        if len(self._sums) != batch:
            self._sums = [RowSums() for _ in range(batch)]
        if self._packed is None or len(self._packed) != batch:
            self._packed = torch.zeros(batch, n_kv, dim + 1, 2 * dim, device=k.device)
            self._counted = torch.zeros(batch, dtype=torch.int32, device=k.device)
            self._held = None
        before = [sums.n for sums in self._sums]
        self._take_in(middles)
        for b, n in enumerate(middles):
            if n and (n != before[b] or self._held is None):
                self._packed[b] = self._sums[b].packed()
        self._held = list(middles), list(left_out)
        counted = [n * left for n, left in zip(middles, left_out, strict=True)]
        self._counted.copy_(torch.tensor(counted, dtype=torch.int32))
        return Moments(self._packed, self._counted)

    def _take_in(self, middles: list[int]) -> None:
        for b, n in enumerate(middles):
            sums = self._sums[b]
            for first in range(sums.n, n, AT_ONCE):
                sums.add(self._read(b, first, min(first + AT_ONCE, n)))

    def _read(self, b: int, first: int, last: int) -> Float[Tensor, "Hkv n twice_D"]:
        """Keys beside values of these rows of the middle."""
        first, last = self._n_sink + first, self._n_sink + last
        if isinstance(self._rows, FileRows):
            read = self._rows.file.read(first, last)  # [n, Hkv, 2, width]
            parts = read[:, :, 0].transpose(0, 1), read[:, :, 1].transpose(0, 1)
        else:
            parts = (self._rows.vectors[name][b, :, first:last] for name in ("k", "v"))
        floats = [dequantize_rows(t) if t.dtype == torch.int8 else t for t in parts]
        return torch.cat([t.float() for t in floats], -1)

    def truncate(self, middles: list[int]) -> None:
        """Rows behind these have gone: what is summed up of them cannot be told apart."""
        for b, n in enumerate(middles[: len(self._sums)]):
            if self._sums[b].n > n:
                self._sums[b], self._held = RowSums(), None

    def select_sequences(self, chosen: list[int]) -> None:
        if self._sums:
            self._sums = [self._sums[b].copy() for b in chosen]
        self._packed = self._held = None

    def state(self, middles: list[int]) -> dict[str, Tensor]:
        """What is saved of a store that has estimated its rest."""
        if not self._sums or not all(middles):
            return {}
        self._take_in(middles)
        return {
            "origin": torch.stack([s.origin for s in self._sums]),
            "sum": torch.stack([s.sum for s in self._sums]),
            "products": torch.stack([s.products for s in self._sums]),
        }

    def restore(self, state: dict[str, Tensor], middles: list[int]) -> None:
        """As saved, where it was; else rows are read again at the first step. ValueError where
        it does not fit."""
        if not state:
            return
        k = self._rows.vectors["k"]
        batch, n_kv, dim = len(middles), k.shape[1], head_dim(k)
        expected = {
            "origin": (batch, n_kv, 1, 2 * dim), "sum": (batch, n_kv, 1, 2 * dim),
            "products": (batch, n_kv, dim, 2 * dim),
        }  # fmt: skip
        for name, shape in expected.items():
            own = state.get(name)
            if own is None or own.shape != shape or not own.is_floating_point():
                found = None if own is None else (tuple(own.shape), own.dtype)
                raise ValueError(f"{name} of the rest must be {shape}, floats; got {found}")
            if not own.isfinite().all():
                raise ValueError(f"{name} of the rest must be finite; got NaN or inf")
        self._sums = [
            RowSums(n, *(state[name][b].clone() for name in expected))
            for b, n in enumerate(middles)
        ]


class RowSums:
    """Sums over n rows `[Hkv, n, 2 D]`, key beside value: of what they differ by from the mean of
    the first ones, and of its products with that of the key; float64."""

    def __init__(
        self,
        n: int = 0,
        origin: Tensor | None = None,
        sum_: Tensor | None = None,
        products: Tensor | None = None,
    ):
        self.n, self.origin, self.sum, self.products = n, origin, sum_, products

    @property
    def nbytes(self) -> int:
        held = (self.origin, self.sum, self.products)
        return sum(t.nbytes for t in held if t is not None)

    def copy(self) -> "RowSums":
        held = (self.origin, self.sum, self.products)
        return RowSums(self.n, *(None if t is None else t.clone() for t in held))

    def add(self, rows: Float[Tensor, "Hkv n twice_D"]) -> None:
        dim = rows.shape[2] // 2
        if self.n == 0:
            self.origin = rows.double().mean(1, keepdim=True).float().nan_to_num(0, 0, 0)
            self.sum = torch.zeros_like(self.origin, dtype=torch.float64)
            self.products = self.sum.repeat(1, dim, 1)
        own = rows - self.origin
        self.n += rows.shape[1]
        self.sum += own.sum(1, keepdim=True, dtype=torch.float64)
        self.products += own[..., :dim].mT @ own

    def packed(self) -> Float[Tensor, "Hkv D_plus_1 twice_D"]:
        """A part of `Moments.packed`."""
        dim = self.products.shape[1]
        mean = self.sum / self.n
        spread = self.products / self.n - mean[..., :dim].mT * mean
        return torch.cat([spread, self.origin + mean], 1).float()
