"""How the rows that steps leave out are spread: sums that grow with the rows of a store."""

import torch
from jaxtyping import Float
from torch import Tensor

from saap.index.rows import BucketRows
from saap.kernels.attention.int8_rows import dequantize_rows, head_dim
from saap.kernels.rest import Moments

from .file_rows import FileRows
from .row_sums import N_CLUSTERS, SAMPLE, Clusters, RowSums

AT_ONCE = 4096
"""Rows that are held as floats at once."""

PART = 32
"""The newest rows that are not summed up yet are fewer than one in so many."""


def counted(n: int) -> int:
    """How many of the n rows of a middle are summed up: all but a few of the newest, which change
    means and covariances less than it costs to add them as they come."""
    every = 1 << max(0, (n // PART).bit_length() - 1)
    return n - n % every


def clustered(n: int) -> int:
    """How many of the first of n rows their clusters are found among: more than four fifths, and
    others only after the rows have grown by an eighth or more, since all are summed up anew
    then."""
    every = 1 << max(0, n.bit_length() - 3)
    return n - n % every


def sample_step(n: int) -> int:
    """How far apart of n rows those are that clusters are found among."""
    return -(-n // SAMPLE)


def empty_moments(batch: int, n_kv: int, dim: int, device: torch.device) -> Moments:
    bfloats = {"dtype": torch.bfloat16, "device": device}
    return Moments(
        torch.zeros(batch, n_kv, dim, 2 * dim, **bfloats),
        torch.zeros(batch, n_kv, 2 * dim, device=device, dtype=torch.float32),
        torch.zeros(batch, n_kv, dim, N_CLUSTERS, **bfloats),
        torch.zeros(batch, n_kv, N_CLUSTERS, dim, **bfloats),
        torch.zeros(batch, n_kv, 2, N_CLUSTERS, device=device, dtype=torch.float32),
        torch.zeros(batch, dtype=torch.int32, device=device),
    )


class RestOfRows:
    """`Moments` of the middle of each sequence, whose rows are in time order.

    Sums are over `counted` rows, in clusters that were found among the `clustered` first ones of
    these, however they came; rows that are new are added when `moments` is asked for.
    """

    def __init__(self, rows: BucketRows | FileRows, n_sink: int):
        self._rows, self._n_sink = rows, n_sink
        self._sums: list[RowSums | None] = []  # of each sequence
        self._moments: Moments | None = None
        self._held: tuple[list[int], list[bool]] | None = None

    @property
    def nbytes(self) -> int:
        own = [] if self._moments is None else vars(self._moments).values()
        return sum(t.nbytes for t in own) + sum(s.nbytes for s in self._sums if s is not None)

    def moments(self, middles: list[int], left_out: list[bool]) -> Moments:
        """`left_out`: whether a step leaves out rows of that sequence at all."""
        if self._held == (middles, left_out):
            return self._moments
        k = self._rows.vectors["k"]
        batch, n_kv, dim = len(middles), k.shape[1], head_dim(k)
        if self._moments is None or len(self._moments.means) != batch:
            self._moments = empty_moments(batch, n_kv, dim, k.device)
            self._held = None
        found = self._moments
        for b, n in enumerate(middles):
            if n and (self._held is None or counted(self._held[0][b]) != counted(n)):
                for name, own in self.sums(b, n).moments().items():
                    getattr(found, name)[b] = own
        self._held = list(middles), list(left_out)
        n_rows = [n * left for n, left in zip(middles, left_out, strict=True)]
        found.n_rows.copy_(torch.tensor(n_rows, dtype=torch.int32))
        return found

    def sums(self, b: int, n: int) -> RowSums:
        """Over the `counted` of the first n rows of a sequence's middle."""
        if b >= len(self._sums):
            self._sums += [None] * (b + 1 - len(self._sums))
        held, n = self._sums[b], counted(n)
        if held is None or held.n > n or clustered(held.n) != clustered(n):
            last = clustered(n)
            self._sums[b] = RowSums(Clusters.of(self.every(b, 0, last, sample_step(last))))
        return self._extended(b, n)

    def sums_in(self, clusters: Clusters, n: int) -> RowSums:
        """Over the first n rows of the one sequence, in clusters that others have found."""
        held = self._sums[0] if self._sums else None
        if held is None or held.clusters is not clusters or held.n > n:
            self._sums = [RowSums(clusters)]
        return self._extended(0, n)

    def _extended(self, b: int, n: int) -> RowSums:
        sums = self._sums[b]
        for first in range(sums.n, n, AT_ONCE):
            sums.add(self._read(b, first, min(first + AT_ONCE, n)))
        return sums

    def every(self, b: int, first: int, last: int, step: int) -> Float[Tensor, "Hkv n twice_D"]:
        """Every `step`-th of these rows of the middle, floats, keys beside values."""
        at_once = max(1, AT_ONCE // step) * step
        starts = range(first, last, at_once)
        return torch.cat([self._read(b, n, min(n + at_once, last), step) for n in starts], 1)

    def _read(self, b: int, first: int, last: int, step: int = 1) -> Tensor:
        """Keys beside values of these rows of the middle, `[Hkv, n, 2 D]`; every `step`-th."""
        first, last = self._n_sink + first, self._n_sink + last
        if isinstance(self._rows, FileRows):
            read = self._rows.file.read(first, last)[::step]  # [n, Hkv, 2, width]
            parts = read[:, :, 0].transpose(0, 1), read[:, :, 1].transpose(0, 1)
        else:
            parts = (self._rows.vectors[name][b, :, first:last:step] for name in ("k", "v"))
        floats = [dequantize_rows(t) if t.dtype == torch.int8 else t for t in parts]
        return torch.cat([t.float() for t in floats], -1)

    def truncate(self, middles: list[int]) -> None:
        """Rows behind these have gone: what is summed up of them cannot be told apart."""
        for b, n in enumerate(middles[: len(self._sums)]):
            if self._sums[b] is not None and self._sums[b].n > counted(n):
                self._sums[b] = self._held = None

    def select_sequences(self, chosen: list[int]) -> None:
        if self._sums:
            own = [self._sums[b] if b < len(self._sums) else None for b in chosen]
            self._sums = [None if s is None else s.copy() for s in own]
        self._moments = self._held = None

    def state(self, middles: list[int]) -> dict[str, Tensor]:
        """What is saved of a store that has estimated its rest."""
        if not self._sums or not all(middles):
            return {}
        sums = [self.sums(b, n).tensors() for b, n in enumerate(middles)]
        return {name: torch.stack([own[name] for own in sums]) for name in RowSums.NAMES}

    def restore(self, state: dict[str, Tensor], middles: list[int]) -> None:
        """As saved, where it was; else rows are read again at the first step. ValueError where
        it does not fit."""
        if not state:
            return
        k = self._rows.vectors["k"]
        batch, n_kv, dim = len(middles), k.shape[1], head_dim(k)
        expected = {
            "origin": (1, 2 * dim), "centroids": (N_CLUSTERS, dim), "limit": (1,),
            "counts": (N_CLUSTERS, 1), "sums": (N_CLUSTERS, 2 * dim), "squares": (N_CLUSTERS, 1),
            "products": (dim, 2 * dim),
        }  # fmt: skip
        for name, own_shape in expected.items():
            own, shape = state.get(name), (batch, n_kv, *own_shape)
            dtype = torch.float64 if name in RowSums.ADDED else torch.float32
            if own is None or own.shape != shape or own.dtype != dtype:
                found = None if own is None else (tuple(own.shape), own.dtype)
                raise ValueError(f"{name} of the rest must be {shape}, {dtype}; got {found}")
            if own.isnan().any():
                raise ValueError(f"{name} of the rest must be numbers; got NaN")
        self._sums = [
            RowSums.restored(counted(n), {name: state[name][b].clone() for name in expected})
            for b, n in enumerate(middles)
        ]
