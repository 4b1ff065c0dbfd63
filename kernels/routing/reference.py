"""Scoring and selection in plain PyTorch: the oracle of every other backend, never optimised."""

import torch
from torch import Tensor

from . import validate


def cell_weights(
    q: Tensor,
    keys: Tensor,
    inv_freq: Tensor,
    sizes: Tensor,
    n_middle: Tensor,
    distance: Tensor,
    *,
    n_segments: int,
    network: tuple[Tensor, ...] | None,
    trained_share: float,
    interleaved: bool,
    share: str,
    by_size: bool,
) -> Tensor:
    """As `api.cell_weights`, whose validation is taken for granted, on any device.

    Computed and returned in float64 if q or keys is, else in float32.
    """
    compute = torch.promote_types(torch.promote_types(q.dtype, keys.dtype), torch.float32)
    q, keys = q.to(compute), keys.to(compute)
    kv_heads, nlist = keys.shape[:2]
    held = sizes.to(compute).unflatten(-1, (nlist, n_segments))[:, :, None]  # [B, Hkv, 1, ...]
    scores = turned_scores(
        q, keys, inv_freq, n_middle, distance, n_segments=n_segments, interleaved=interleaved
    )
    middle = 1.0
    if network:
        logits = _logits(q, *network).unflatten(1, (kv_heads, -1))
        inside, outside = logits[..., :-1], logits[..., -1:]
        scores = trained_share * inside[..., None] + (1 - trained_share) * scores
        mass = torch.cat([inside + held.sum(-1).log(), outside], -1).softmax(-1)
        middle = mass[..., :-1].sum(-1)[..., None, None]
    scores = scores.masked_fill(held <= 0, -torch.inf)
    top = scores.amax((-2, -1), keepdim=True)
    weights = (scores - top.masked_fill(top == -torch.inf, 0.0)).exp()
    total = (weights * held).sum((-2, -1), keepdim=True)
    weights = weights * (middle / total.masked_fill(total == 0, 1.0))
    if share == "group":
        weights = weights.sum(2, keepdim=True)
    if by_size:
        weights = weights * held
    return weights.flatten(-2).flatten(1, 2)


def _logits(q, mean, scale, w1, b1, w2, b2, w2_scale=None) -> Tensor:
    """The network's logits for each bucket, and last for all outside the middle."""
    w2 = w2.to(q.dtype) if w2_scale is None else w2 * w2_scale.to(q.dtype)[..., None]
    x = ((q - mean.to(q.dtype)) * scale.to(q.dtype)).transpose(0, 1)  # [Hq, B, D]
    hidden = torch.nn.functional.silu(x @ w1.to(q.dtype).mT + b1.to(q.dtype)[:, None])
    return (hidden @ w2.mT + b2.to(q.dtype)[:, None]).transpose(0, 1)


def turned_scores(
    q: Tensor,
    keys: Tensor,
    inv_freq: Tensor,
    n_middle: Tensor,
    distance: Tensor,
    *,
    n_segments: int,
    interleaved: bool,
) -> Tensor:
    """Products of typical keys with queries turned to each segment, `[B, Hkv, G, nlist, S]`."""
    ages, width = segment_ages(n_middle, distance, n_segments)
    turned = rotated_to_age(q, ages, width, inv_freq, interleaved=interleaved)
    grouped = turned.unflatten(1, (len(keys), -1)).flatten(2, 3)  # [B, Hkv, G * S, D]
    scores = (keys @ grouped.mT).unflatten(-1, (-1, n_segments))
    return scores.transpose(2, 3)


def segment_ages(n_middle: Tensor, distance: Tensor, n_segments: int) -> tuple[Tensor, Tensor]:
    """How far the keys of each segment are from the query on average, `[B, S]`, and how many keys
    a segment has, `[B]`; float64, since an age times a frequency needs more digits than float32
    has."""
    n = n_middle.double().clamp(min=1)
    place = torch.arange(n_segments, dtype=n.dtype, device=n.device) + 0.5
    ages = distance.double()[:, None] - (place * n[:, None] / n_segments - 0.5)
    return ages, (n / n_segments).clamp(min=1)


def rotated_to_age(
    q: Tensor, ages: Tensor, width: Tensor, inv_freq: Tensor, *, interleaved: bool
) -> Tensor:
    """De-RoPEd queries turned so that their product with a de-RoPEd key is the attention score.

    The score of a key that stands `age` tokens back is `q . R(-age) k = (R(age) q) . k`; this is
    the mean of it over `width` consecutive ages around each of `ages`, which damps the pairs that
    turn fast within a segment. `q [B, H, D]`, `ages [B, S]`, `width [B]`; returns `[B, H, S, D]`.
    """
    frequencies = inv_freq.double()
    turns = frequencies / (2 * torch.pi)
    # The mean of cos(frequency * i) over `width` consecutive i around 0.
    damping = torch.sinc(width[:, None] * turns) / torch.sinc(turns)
    angle = ages[..., None] * frequencies
    cos, sin = ((f(angle) * damping[:, None]).to(q.dtype) for f in (torch.cos, torch.sin))
    cos, sin, q = cos[:, None], sin[:, None], q[:, :, None]
    r = 2 * len(inv_freq)
    if interleaved:
        first, second = q[..., 0:r:2], q[..., 1:r:2]
    else:
        first, second = q[..., : r // 2], q[..., r // 2 : r]
    parts = (first * cos - second * sin, second * cos + first * sin)
    both = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat([both, q[..., r:].expand(*both.shape[:-1], -1)], -1)


def select_lists(
    scores: Tensor,
    offsets: Tensor,
    *,
    nprobe: int | None,
    max_tokens: int | None,
    top_p: float | None,
    min_score: float | None,
    per_row: bool,
    first_row: int,
    out: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """As `api.select_lists`, whose validation is taken for granted, on any device.

    Ranges come in the order of the scores, one per list.
    """
    validate.check_offset_values(offsets, first_row)
    batch, heads, n_lists = scores.shape
    offsets = offsets.repeat_interleave(heads // offsets.shape[1], 1).expand(batch, -1, -1)
    no_number, left_out = scores.isnan(), offsets.diff(dim=-1) == 0
    if min_score is not None and min_score > -torch.inf:
        left_out = left_out | no_number | (scores < min_score)
    sizes = offsets.diff(dim=-1).masked_fill(left_out, 0)
    # The best first, of equal ones the first; then what has no number; then what is left out.
    lowest = torch.finfo(torch.float64).min
    rank = scores.double().clamp(min=lowest / 2).masked_fill(no_number, lowest)
    rank = rank.masked_fill(left_out, -torch.inf)
    order = rank.argsort(dim=-1, descending=True, stable=True)
    # A list holds at least one row, so max_tokens lists are enough.
    order = order[..., : min(n for n in (n_lists, nprobe, max_tokens) if n is not None)]
    lengths = sizes.gather(-1, order)
    if top_p is not None and top_p < 1:  # sums are rounded: a share of all is all
        mass = scores.double().masked_fill(no_number | left_out, 0.0).clamp(min=0)
        mass = mass * sizes if per_row else mass
        before = torch.nn.functional.pad(mass.gather(-1, order).cumsum(-1), (1, 0))[..., :-1]
        needed = before < top_p * mass.sum(-1, keepdim=True)
        needed[..., :1] = True
        lengths = lengths * needed
    if max_tokens is not None:
        before = lengths.cumsum(-1) - lengths
        lengths = torch.minimum(lengths, (max_tokens - before).clamp(min=0))
    starts = offsets.gather(-1, order + 1) - lengths + first_row
    used = lengths.shape[-1]
    for target, found in zip(out, (starts.masked_fill(lengths == 0, 0), lengths), strict=True):
        target[..., :used] = found
        target[..., used:] = 0
    return out[0][..., :used], out[1][..., :used]
