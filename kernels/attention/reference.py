"""Attention over ranges in plain PyTorch: the oracle of every other backend, never optimised."""

import itertools

import torch
from torch import Tensor

from .int8_rows import widened


def attend_ranges(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    lengths: Tensor,
    *,
    sm_scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query head over the rows that its ranges select.

    Any floating-point dtype on any device; 16-bit inputs are computed in float32. Shapes as in
    `api.attend_ranges`, whose validation is taken for granted.

    Returns:
        `out [B, Hq, D]` in q's dtype; `lse [B, Hq]`, natural log, float64 if an input is, else
        float32.

    Raises:
        ValueError: two ranges of one row overlap.
    """
    batch, q_heads, _ = q.shape
    range_heads, kv_heads = starts.shape[1], k.shape[1]
    heads_per_row = q_heads // range_heads
    stored = torch.float32 if k.dtype == torch.int8 else k.dtype
    compute = torch.promote_types(torch.promote_types(q.dtype, stored), torch.float32)

    out = q.new_zeros(q.shape)
    lse = q.new_full((batch, q_heads), -torch.inf, dtype=compute)
    for b in range(batch):
        for row in range(range_heads):
            selected = _selected(starts[b, row], lengths[b, row], f"batch {b}, row {row}")
            if not len(selected):
                continue
            heads = slice(row * heads_per_row, (row + 1) * heads_per_row)
            kv_head = row * kv_heads // range_heads
            keys = widened(k[b, kv_head, selected], compute)
            values = widened(v[b, kv_head, selected], compute)
            scores = q[b, heads].to(compute) @ keys.T * sm_scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            out[b, heads] = (torch.softmax(scores, dim=-1) @ values).to(q.dtype)
            lse[b, heads] = torch.logsumexp(scores, dim=-1)
    return out, lse


def _selected(starts: Tensor, lengths: Tensor, where: str) -> Tensor:
    """Rows of the store that one list of ranges selects, in the order of the ranges."""
    ranges = [(s, s + n) for s, n in zip(starts.tolist(), lengths.tolist(), strict=True) if n]
    ordered = sorted(ranges)
    for (a, a_end), (b, b_end) in itertools.pairwise(ordered):
        if b < a_end:
            raise ValueError(
                f"ranges must not overlap; got [{a}, {a_end}) and [{b}, {b_end}) in {where}"
            )
    pieces = [torch.arange(a, end, device=starts.device) for a, end in ranges]
    return torch.cat(pieces) if pieces else starts.new_empty(0, dtype=torch.int64)
