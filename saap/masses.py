"""True attention mass over buckets: what routers are trained on, `y = A . onehot(bucket)`."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def bucket_masses(
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
    block: int = 256,
) -> Float[Tensor, "B Hq T nlist_plus_1"]:
    """Softmax weight of each bucket's middle keys for each query, float32.

    `positions [T]` are the places of the queries among the N keys; a query sees keys up to its
    own. The middle is everything but the first `n_sink` and the last `window` keys it sees. The
    last class is the mass outside the middle, so a query's masses sum to 1. Scores are those of
    the RoPE'd vectors. Memory is bounded by `G * block * N` floats a KV head.

    Source: Saap, arXiv 2502.08246, section 4.2.
    """
    batch, n_heads, length, _ = q_rope.shape
    n_kv, n = k_rope.shape[1:3]
    group = n_heads // n_kv
    out = torch.empty(batch, n_heads, length, nlist + 1, device=q_rope.device)
    columns = torch.arange(n, device=q_rope.device)
    for b in range(batch):
        for head in range(n_kv):
            member = torch.nn.functional.one_hot(buckets[b, head].long(), nlist).float()
            for start in range(0, length, block):
                place = positions[start : start + block, None]
                last = int(place.max()) + 1
                heads = slice(head * group, (head + 1) * group)
                q = q_rope[b, heads, start : start + block].float()
                scores = (q * sm_scale) @ k_rope[b, head, :last].float().T
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                seen = columns[:last] <= place
                weights = scores.masked_fill_(~seen, -torch.inf).softmax(-1)
                middle = (columns[:last] >= n_sink) & (columns[:last] <= place - window)
                masses = (weights * middle) @ member[:last]
                out[b, heads, start : start + block, :nlist] = masses
                out[b, heads, start : start + block, nlist] = 1.0 - masses.sum(-1)
    return out
