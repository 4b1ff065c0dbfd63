"""True attention mass over buckets and segments: what routers are trained on."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saap.index.cells import cells_of


@dataclass(frozen=True)
class Masses:
    """Where the attention of T queries lies, float32.

    `buckets [B, Hq, T, nlist + 1]`: softmax weight of each bucket's middle keys, and last the
    weight outside the middle, so that a query's masses sum to 1. `segments [B, Hq, T, S]`: the
    same middle, by age. `counts [B, Hkv, blocks, nlist * S]`: keys in each cell. Ages are those
    that the middle one of each `block` queries sees, as in decoding, where lists are counted once
    for many steps.
    """

    buckets: Float[Tensor, "B Hq T nlist_plus_1"]
    segments: Float[Tensor, "B Hq T S"]
    counts: Float[Tensor, "B Hkv blocks cells"]
    block: int


def attention_masses(
    q_rope: Float[Tensor, "B Hq T D"],
    k_rope: Float[Tensor, "B Hkv N D"],
    buckets: Int[Tensor, "B Hkv N"],
    positions: Int[Tensor, " T"],
    nlist: int,
    *,
    sm_scale: float,
    n_sink: int,
    window: int,
    ages: Int[Tensor, " S_minus_1"] | None = None,
    softcap: float | None = None,
    block: int = 64,
) -> Masses:
    """Masses of the queries at `positions [T]`, ascending, among N keys; each sees up to its own.

    The middle is everything but the first `n_sink` and the last `window` keys that a query sees.
    Scores are those of the RoPE'd vectors. `ages`: bounds of the segments (`saap.index.cells`).
    Memory is bounded by a few times `G * block * N` floats.

    Source: Saap, arXiv 2502.08246, section 4.2: `y = A . onehot(bucket)`.
    """
    batch, n_heads, length, _ = q_rope.shape
    n_kv = k_rope.shape[1]
    device = q_rope.device
    ages = torch.zeros(0, dtype=torch.int32, device=device) if ages is None else ages.to(device)
    n_segments = len(ages) + 1
    by_bucket = torch.zeros(batch, n_heads, length, nlist + 1, device=device)
    by_segment = torch.zeros(batch, n_heads, length, n_segments, device=device)
    blocks = [slice(s, min(s + block, length)) for s in range(0, length, block)]
    counts = torch.zeros(batch, n_kv, len(blocks), nlist * n_segments, device=device)
    for number, part in enumerate(blocks):
        places = positions[part]
        stop = int(places[-1]) + 1
        age = int(places[len(places) // 2]) - torch.arange(stop, device=device)
        # Keys from old to new: where each segment ends, as the middle query sees it.
        ends = [0, *(int((age >= a).sum()) for a in ages.flip(0)), stop]
        counted = slice(min(n_sink, stop), int((age >= window).sum()))
        for b in range(batch):
            for head in range(n_kv):
                group = slice(head * n_heads // n_kv, (head + 1) * n_heads // n_kv)
                own = buckets[b, head, :stop].long()
                weights = _middle_weights(
                    q_rope[b, group, part], k_rope[b, head, :stop], places,
                    sm_scale=sm_scale, softcap=softcap, n_sink=n_sink, window=window,
                )  # fmt: skip
                by_bucket[b, group, part].scatter_add_(-1, own.expand(weights.shape), weights)
                for segment, (first, last) in enumerate(pairwise(ends)):
                    by_segment[b, group, part, segment] = weights[..., first:last].sum(-1)
                cells = cells_of(own[counted], age[counted], ages)
                counts[b, head, number] = torch.bincount(cells, minlength=counts.shape[-1])
    by_bucket[..., nlist] = 1.0 - by_segment.sum(-1)
    return Masses(by_bucket, by_segment, counts, block)


def _middle_weights(q, k, places, *, sm_scale, softcap, n_sink, window):
    """Causal softmax weights `[G, T, N]`, float32, zero outside the middle."""
    scores = (q.float() * sm_scale) @ k.float().T
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    # Only the newest columns differ from query to query.
    recent = max(0, int(places[0]) + 1 - window)
    age = places[:, None] - torch.arange(recent, k.shape[0], device=q.device)
    scores[..., recent:].masked_fill_(age < 0, -torch.inf)
    weights = scores.softmax(-1)
    weights[..., :n_sink] = 0.0
    weights[..., recent:].masked_fill_(age < window, 0.0)
    return weights
