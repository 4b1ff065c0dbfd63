"""True attention mass over buckets: what routers are trained on."""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saap.index.lists import sizes_of
from saap.index.targets import bucket_masses


@dataclass(frozen=True)
class Masses:
    """Where the attention of T queries lies, float32.

    `buckets [B, Hq, T, nlist + 1]`: softmax weight of each bucket's middle keys, and last the
    weight outside the middle, so that a query's masses sum to 1. `sizes [B, Hkv, blocks, nlist]`:
    keys in each bucket as the middle one of each `block` queries sees them.
    """

    buckets: Float[Tensor, "B Hq T nlist_plus_1"]
    sizes: Float[Tensor, "B Hkv blocks nlist"]
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
    softcap: float | None = None,
    sinks: Float[Tensor, " Hq"] | None = None,
    block: int = 64,
) -> Masses:
    """Masses of the queries at `positions [T]`, ascending, among N keys; each sees up to its own.

    The middle is everything but the first `n_sink` and the last `window` keys that a query sees.
    Scores are those of the RoPE'd vectors. Learned `sinks` are logits that take their share of the
    attention and count as outside the middle. Memory is bounded by a few times `G * block * N`
    floats.

    Source: Saap, arXiv 2502.08246, section 4.2: `y = A . onehot(bucket)`.
    """
    batch, n_heads, length, _ = q_rope.shape
    n_kv = k_rope.shape[1]
    device = q_rope.device
    masses = torch.zeros(batch, n_heads, length, nlist + 1, device=device, dtype=torch.float32)
    blocks = [slice(s, min(s + block, length)) for s in range(0, length, block)]
    sizes = torch.zeros(batch, n_kv, len(blocks), nlist, device=device, dtype=torch.float32)
    for number, part in enumerate(blocks):
        places = positions[part]
        stop = int(places[-1]) + 1
        typical = int(places[len(places) // 2])
        counted = slice(min(n_sink, stop), max(n_sink, typical + 1 - window))
        for b in range(batch):
            for head in range(n_kv):
                group = slice(head * n_heads // n_kv, (head + 1) * n_heads // n_kv)
                own = buckets[b, head, :stop]
                weigh = partial(
                    _middle_weights, places=places, softcap=softcap, n_sink=n_sink,
                    window=window, sinks=None if sinks is None else sinks[group],
                )  # fmt: skip
                masses[b, group, part, :nlist] = bucket_masses(
                    q_rope[b, group, part], k_rope[b, head, :stop], own, nlist,
                    sm_scale=sm_scale, weigh=weigh,
                )  # fmt: skip
                sizes[b, head, number] = sizes_of(own[counted], nlist)
    masses[..., nlist] = 1.0 - masses.sum(-1)
    return Masses(masses, sizes, block)


def _middle_weights(scores, *, places, softcap, n_sink, window, sinks):
    """Causal softmax weights `[G, T, N]`, float32, zero outside the middle."""
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    # Only the newest columns differ from query to query.
    recent = max(0, int(places[0]) + 1 - window)
    age = places[:, None] - torch.arange(recent, scores.shape[-1], device=scores.device)
    scores[..., recent:].masked_fill_(age < 0, -torch.inf)
    weights = scores.softmax(-1)
    if sinks is not None:
        weights *= torch.sigmoid(scores.logsumexp(-1) - sinks.float()[:, None])[..., None]
    weights[..., :n_sink] = 0.0
    weights[..., recent:].masked_fill_(age < window, 0.0)
    return weights
