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

PART = 32
"""The newest rows that are not summed up yet are fewer than one in so many."""


def counted(n: int) -> int:
    """How many of the n rows of a middle are summed up: all but a few of the newest, which change
    means and covariances less than it costs to add them as they come."""
    every = 1 << max(0, (n // PART).bit_length() - 1)
    return n - n % every


class RestOfRows:
    """`Moments` of the middle of each sequence, whose rows are in time order.

    Sums are of what rows differ by from the first ones, so that little cancels; rows that are new
    are added when `moments` is asked for. Sums are over `counted` rows, however these came.
    """

    def __init__(self, rows: BucketRows | FileRows, n_sink: int):
        self._rows, self._n_sink = rows, n_sink
        self._sums: list[RowSums] = []  # of each sequence
        self._moments: Moments | None = None
        self._held: tuple[list[int], list[bool]] | None = None

    @property
    def nbytes(self) -> int:
        own = self._moments
        held = 0 if own is None else own.spread.nbytes + own.means.nbytes
        return held + sum(s.nbytes for s in self._sums)

    def moments(self, middles: list[int], left_out: list[bool]) -> Moments:
        """`left_out`: whether a step leaves out rows of that sequence at all."""
        if self._held == (middles, left_out):
            return self._moments
        k = self._rows.vectors["k"]
        batch, n_kv, dim = len(middles), k.shape[1], head_dim(k)
        sums = self.sums([counted(n) for n in middles])
        if self._moments is None or len(self._moments.means) != batch:
            self._moments = Moments(
                torch.zeros(batch, n_kv, dim, 2 * dim, dtype=torch.bfloat16, device=k.device),
                torch.zeros(batch, n_kv, 2 * dim, device=k.device),
                torch.zeros(batch, dtype=torch.int32, device=k.device),
            )
            self._held = None
        found = self._moments
        for b, n in enumerate(middles):
            if n and (self._held is None or counted(self._held[0][b]) != counted(n)):
                found.spread[b], found.means[b] = sums[b].moments()
        self._held = list(middles), list(left_out)
        n_rows = [n * left for n, left in zip(middles, left_out, strict=True)]
        found.n_rows.copy_(torch.tensor(n_rows, dtype=torch.int32))
        return found

    def sums(self, counts: list[int]) -> list["RowSums"]:
        """Over the first so many rows of each sequence's middle, no fewer than before."""
        if len(self._sums) != len(counts):
            self._sums = [RowSums() for _ in counts]
        for b, n in enumerate(counts):
            sums = self._sums[b]
            for first in range(sums.n, n, AT_ONCE):
                sums.add(self._read(b, first, min(first + AT_ONCE, n)))
        return self._sums

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
            if self._sums[b].n > counted(n):
                self._sums[b], self._held = RowSums(), None

    def select_sequences(self, chosen: list[int]) -> None:
        if self._sums:
            self._sums = [self._sums[b].copy() for b in chosen]
        self._moments = self._held = None

    def state(self, middles: list[int]) -> dict[str, Tensor]:
        """What is saved of a store that has estimated its rest."""
        if not self._sums or not all(middles):
            return {}
        sums = self.sums([counted(n) for n in middles])
        return {name: torch.stack([s.tensors()[name] for s in sums]) for name in RowSums.NAMES}

    def restore(self, state: dict[str, Tensor], middles: list[int]) -> None:
        """As saved, where it was; else rows are read again at the first step. ValueError where
        it does not fit."""
        if not state:
            return
        k = self._rows.vectors["k"]
        batch, n_kv, dim = len(middles), k.shape[1], head_dim(k)
        expected = {
            "origin": (batch, n_kv, 1, 2 * dim), "limit": (batch, n_kv, 1),
            "kept": (batch, n_kv, 1, 1), "sum": (batch, n_kv, 1, 2 * dim),
            "products": (batch, n_kv, dim, 2 * dim),
        }  # fmt: skip
        for name, shape in expected.items():
            own = state.get(name)
            if own is None or own.shape != shape or not own.is_floating_point():
                found = None if own is None else (tuple(own.shape), own.dtype)
                raise ValueError(f"{name} of the rest must be {shape}, floats; got {found}")
            if own.isnan().any():
                raise ValueError(f"{name} of the rest must be numbers; got NaN")
        self._sums = [
            RowSums(counted(n), {name: state[name][b].clone() for name in expected})
            for b, n in enumerate(middles)
        ]


class RowSums:
    """Sums over n rows `[Hkv, n, 2 D]`, key beside value: of what they differ by from the mean of
    the first ones, and of its products with that of the key; float64.

    Keys that are very far from the others are not counted. A query that meets one either visits
    its row or hardly looks at it, while a single one can make the variance of all scores many
    times what it is for the others (some models have such keys at separators).
    """

    NAMES = ("origin", "limit", "kept", "sum", "products")
    FAR = 4.0
    """Times the median distance of keys from their mean."""

    def __init__(self, n: int = 0, held: dict[str, Tensor] | None = None):
        self.n, self._held = n, held or {}

    def tensors(self) -> dict[str, Tensor]:
        """`origin, sum [Hkv, 1, 2 D]`, `limit [Hkv, 1]`, `kept [Hkv, 1, 1]`, `products [Hkv, D,
        2 D]`."""
        return self._held

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self._held.values())

    def copy(self) -> "RowSums":
        return RowSums(self.n, {name: t.clone() for name, t in self._held.items()})

    def add(self, rows: Float[Tensor, "Hkv n twice_D"]) -> None:
        dim = rows.shape[2] // 2
        if self.n == 0:
            origin = rows.double().mean(1, keepdim=True).float()
            distance = (rows - origin)[..., :dim].norm(dim=2).median(1, keepdim=True).values
            zero = torch.zeros_like(origin, dtype=torch.float64)
            self._held = {
                "origin": origin,
                "limit": torch.where(distance > 0, self.FAR * distance, torch.inf),
                "kept": zero[..., :1].clone(),
                "sum": zero,
                "products": zero.repeat(1, dim, 1),
            }
        held = self._held
        own = rows - held["origin"]
        near = own[..., :dim].norm(dim=2) <= held["limit"]
        own = torch.where(near[..., None], own, 0.0)
        self.n += rows.shape[1]
        held["kept"] += near.sum(1, dtype=torch.float64)[:, None, None]
        held["sum"] += own.sum(1, keepdim=True, dtype=torch.float64)
        held["products"] += own[..., :dim].mT @ own

    def moments(self) -> tuple[Float[Tensor, "Hkv D twice_D"], Float[Tensor, "Hkv twice_D"]]:
        """`spread` and `means` of `Moments`."""
        held = self._held
        spread, mean = as_moments(held["kept"], held["sum"], held["products"])
        return spread, held["origin"][:, 0] + mean

    def about_zero(self) -> tuple[Tensor, Tensor, Tensor]:
        """`kept`, `sum` and `products` of the rows themselves, not of what they differ by, so that
        those of other rows can be added."""
        kept, total, products = (self._held[name] for name in ("kept", "sum", "products"))
        origin, dim = self._held["origin"].double(), products.shape[1]
        both = total[..., :dim].mT * origin + origin[..., :dim].mT * (total + kept * origin)
        return kept, total + kept * origin, products + both


def as_moments(
    kept: Float[Tensor, "Hkv 1 1"],
    total: Float[Tensor, "Hkv 1 twice_D"],
    products: Float[Tensor, "Hkv D twice_D"],
) -> tuple[Float[Tensor, "Hkv D twice_D"], Float[Tensor, "Hkv twice_D"]]:
    """Covariances and means of so many rows with these sums."""
    kept = kept.clamp(min=1)
    mean = total / kept
    return products / kept - mean[..., : products.shape[1]].mT * mean, mean[:, 0]
