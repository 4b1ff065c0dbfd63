"""The targets that `AsymmetricIVF.train` fits a router to: attention mass over buckets."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor


def bucket_masses(
    q: Float[Tensor, "G m D"],
    k: Float[Tensor, "n D"],
    buckets: Int[Tensor, " n"],
    nlist: int,
    *,
    sm_scale: float,
    weigh: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "G m nlist"]:
    """Attention weight of each bucket's keys for each query of one KV head, float32.

    `weigh` turns scaled scores into weights `[G, m, n]`; if not given, softmax over all keys.
    Memory is a few times `G * m * n` floats.
    """
    scores = (q.float() * sm_scale) @ k.float().T
    weights = scores.softmax(-1) if weigh is None else weigh(scores)
    masses = torch.zeros(*weights.shape[:2], nlist, device=q.device, dtype=torch.float32)
    return masses.scatter_add_(-1, buckets.long().expand(weights.shape), weights)


def query_masses(
    q: Float[Tensor, "Hq m D"],
    keys: Float[Tensor, "Hkv n D"],
    buckets: Int[Tensor, "Hkv n"],
    nlist: int,
    *,
    sm_scale: float,
    chunk: int = 256,
) -> Float[Tensor, "Hq m nlist_plus_1"]:
    """Softmax weight of each bucket's keys for each query; the last class, outside, is 0.

    Every query sees every key. Memory is bounded by `chunk * n` floats per query head.

    Source: Saap, arXiv 2502.08246, section 4.2.
    """
    group = len(q) // len(keys)
    masses = torch.zeros(*q.shape[:2], nlist + 1, device=q.device, dtype=torch.float32)
    for head, own_keys in enumerate(keys):
        for number in range(head * group, (head + 1) * group):
            own = slice(number, number + 1)
            for start in range(0, q.shape[1], chunk):
                part = slice(start, start + chunk)
                masses[own, part, :nlist] = bucket_masses(
                    q[own, part], own_keys, buckets[head], nlist, sm_scale=sm_scale
                )
    return masses
