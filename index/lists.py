"""Inverted lists as CSR tensors, and the step from scored buckets to ranges of rows."""

from dataclasses import dataclass
from numbers import Integral, Real

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class InvertedLists:
    """Rows of each bucket, for each (batch, KV head).

    `order [B, Hkv, n]` int64: the points in bucket order, ascending within a bucket (so rows of a
    bucket stay in time order). `offsets [B, Hkv, nlist + 1]` int32: bucket b holds
    `order[..., offsets[b] : offsets[b + 1]]`.
    """

    order: Int[Tensor, "B Hkv n"]
    offsets: Int[Tensor, "B Hkv nlist_plus_1"]

    @property
    def nlist(self) -> int:
        return self.offsets.shape[-1] - 1

    @property
    def sizes(self) -> Int[Tensor, "B Hkv nlist"]:
        return self.offsets.diff(dim=-1)

    def imbalance(self) -> Float[Tensor, "B Hkv"]:
        return imbalance_factor(self.sizes)


def imbalance_factor(sizes: Int[Tensor, "*heads nlist"]) -> Float[Tensor, "*heads"]:
    """FAISS's imbalance factor: `nlist * sum(size^2) / n^2`; 1 when all are equally large."""
    sizes = sizes.double()
    return sizes.shape[-1] * (sizes**2).sum(-1) / sizes.sum(-1).clamp(min=1) ** 2


@dataclass(frozen=True)
class BucketStatistics:
    """Bucket sizes, `imbalance_factor` of each head and number of empty buckets of each head."""

    sizes: Int[Tensor, "Hkv nlist"]
    imbalance: Float[Tensor, " Hkv"]
    n_empty: Int[Tensor, " Hkv"]

    @classmethod
    def of(cls, offsets: Int[Tensor, "Hkv nlist_plus_1"]) -> "BucketStatistics":
        sizes = offsets.diff(dim=-1)
        return cls(sizes, imbalance_factor(sizes).float(), (sizes == 0).sum(-1))


def invert(buckets: Int[Tensor, "B Hkv n"], nlist: int) -> InvertedLists:
    """Sort points by bucket; points of a bucket keep their order."""
    order = buckets.argsort(dim=-1, stable=True)
    return InvertedLists(order, offsets_of(sizes_of(buckets, nlist)))


def sizes_of(lists: Int[Tensor, "*heads n"], n_lists: int) -> Int[Tensor, "*heads n_lists"]:
    """How many points are in each list, int32, from the list of each point."""
    sizes = torch.zeros(*lists.shape[:-1], n_lists, dtype=torch.int32, device=lists.device)
    return sizes.scatter_add_(-1, lists.long(), torch.ones_like(lists, dtype=torch.int32))


def offsets_of(sizes: Int[Tensor, "*heads n_lists"]) -> Int[Tensor, "*heads n_lists_plus_1"]:
    """Where each list begins when they lie one after the other, int32, and where the last ends."""
    return torch.nn.functional.pad(sizes.cumsum(-1, dtype=torch.int32), (1, 0))


def expand_heads(per_kv_head: Tensor, n_heads: int) -> Tensor:
    """Repeat dimension 1 (KV heads) so that it matches a selection for `n_heads` heads."""
    group = n_heads // per_kv_head.shape[1]
    return per_kv_head if group == 1 else per_kv_head.repeat_interleave(group, 1)


def group_sum(per_head: Float[Tensor, "B Hq nlist"], n_kv: int) -> Float[Tensor, "B Hkv nlist"]:
    """The predicted mass of each KV head: the sum over its query heads."""
    return per_head.unflatten(1, (n_kv, -1)).sum(2)


def check_bounds(
    nlist: int,
    nprobe: int | None,
    max_tokens: int | None,
    top_p: float | None,
    min_score: float | None = None,
) -> None:
    """Raise ValueError when nothing bounds a selection, or a bound is out of range."""
    for name, value in (("nprobe", nprobe), ("max_tokens", max_tokens)):
        if value is not None and (not isinstance(value, Integral) or isinstance(value, bool)):
            raise ValueError(f"{name} must be a whole number; got {value!r}")
    if nprobe is not None and not 1 <= nprobe <= nlist:
        raise ValueError(f"nprobe must be in 1..{nlist}; got {nprobe}")
    if max_tokens is not None and max_tokens < 0:
        raise ValueError(f"max_tokens must be at least 0; got {max_tokens}")
    if top_p is not None and not (isinstance(top_p, Real) and 0.0 < top_p <= 1.0):
        raise ValueError(f"top_p must be above 0 and at most 1; got {top_p!r}")
    if nprobe is None and max_tokens is None and top_p is None and min_score is None:
        raise ValueError("one of nprobe, max_tokens and top_p must be set; got none of them")


def within_share(
    best: Float[Tensor, "B H R"], mass: Float[Tensor, "B H nlist"], top_p: float
) -> Bool[Tensor, "B H R"]:
    """Which buckets are needed to reach the share `top_p` of all `mass`.

    `best` are the masses of the buckets in descending order, as is the result.
    """
    if top_p == 1.0:  # sums are rounded, so take all buckets
        return torch.ones_like(best, dtype=torch.bool)
    total = mass.clamp(min=0).sum(-1, keepdim=True)
    mass = best.clamp(min=0)
    needed = mass.cumsum(-1) - mass < top_p * total
    needed[..., :1] = True
    return needed


def bucket_of_row(offsets: Int[Tensor, "H nlist_plus_1"], n_rows: int) -> Int[Tensor, "H n_rows"]:
    """The bucket of each row of bucket-sorted rows, int64."""
    numbers = torch.arange(offsets.shape[1] - 1, device=offsets.device)
    return torch.stack(
        [torch.repeat_interleave(numbers, own.diff(), output_size=n_rows) for own in offsets]
    )


def _best_lists(scores, sizes, held, n_ranges, max_tokens, top_p):
    """Scores, numbers and sizes of the `n_ranges` best lists, or of fewer that fill the budget.

    `held [B, H]`: rows in all lists.
    Lists of typical size fill `max_tokens` with far fewer ranges than the worst case needs.
    Finding out costs a synchronisation on a GPU, so it is done on the CPU only.
    """
    n_lists = sizes.shape[-1]
    if max_tokens and n_lists and top_p is None and scores.device.type == "cpu":
        typical = max(1, int(held.max()) // n_lists)
        fewer = 3 * max_tokens // typical + 64
        if fewer < n_ranges:
            values, best = scores.topk(fewer, dim=-1)
            lengths = sizes.gather(-1, best)
            if bool((lengths.sum(-1) >= held.clamp(max=max_tokens)).all()):
                return values, best, lengths
    values, best = scores.topk(n_ranges, dim=-1)
    return values, best, sizes.gather(-1, best)


def bucket_ranges(
    scores: Float[Tensor, "B H nlist"],
    offsets: Int[Tensor, "#B Hkv nlist_plus_1"],
    *,
    nprobe: int | None = None,
    max_tokens: int | None = None,
    top_p: float | None = None,
    min_score: float | None = None,
    per_row: bool = False,
    first_row: int = 0,
) -> tuple[Int[Tensor, "B H R"], Int[Tensor, "B H R"]]:
    """The best-scored buckets as ranges `starts, lengths`, int32, of the bucket-sorted rows.

    Decode steps of a KV store use `saap.kernels.routing.select_lists`, which this package may not
    import; `AsymmetricIVF.select` uses this, on any device and without Numba, and a test holds
    both against each other.

    `H` is Hkv or a multiple of it. Empty buckets are never chosen. `nprobe` visits that many
    buckets; `max_tokens` visits buckets in the order of their scores until that many rows are
    reached and cuts the last one to its newest rows; `top_p` visits buckets until their masses,
    which are the scores, or with `per_row` the scores times the sizes, add up to that share of
    all; `min_score` visits buckets of at least that
    score; several together stop at whichever comes first.
    `first_row` is the row at which bucket 0 begins.
    """
    nlist = scores.shape[-1]
    check_bounds(nlist, nprobe, max_tokens, top_p, min_score)
    offsets = expand_heads(offsets, scores.shape[1]).expand(scores.shape[0], -1, -1)
    sizes = offsets.diff(dim=-1)
    left_out = sizes == 0 if min_score is None else (sizes == 0) | (scores < min_score)
    sizes = sizes.masked_fill(left_out, 0)
    scores = scores.masked_fill(left_out, -torch.inf)
    # A bucket holds at least one row, so max_tokens buckets are enough.
    n_ranges = min(
        nlist if nprobe is None else nprobe, nlist if max_tokens is None else max_tokens
    )
    held = offsets[..., -1] - offsets[..., 0] if min_score is None else sizes.sum(-1)
    values, best, lengths = _best_lists(scores, sizes, held, n_ranges, max_tokens, top_p)
    ends = offsets.gather(-1, best + 1)
    if top_p is not None:
        mass, best_mass = scores.clamp(min=0), values.clamp(min=0)
        if per_row:
            mass, best_mass = mass * sizes, best_mass * lengths
        lengths = lengths * within_share(best_mass, mass, top_p)
    if max_tokens is not None:
        before = lengths.cumsum(-1) - lengths
        lengths = torch.minimum(lengths, (max_tokens - before).clamp(min=0))
    starts = ends - lengths + first_row
    return starts.int(), lengths.int()
