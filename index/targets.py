"""What a router is fitted to when an index trains itself: attention mass over buckets."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


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

    Every query sees every key. Memory is bounded by `chunk * n` floats a query head.

    Source: Saap, arXiv 2502.08246, section 4.2.
    """
    group = len(q) // len(keys)
    masses = torch.zeros(*q.shape[:2], nlist + 1, device=q.device)
    for head, own_keys in enumerate(keys):
        member = buckets[head].long().expand(chunk, -1)
        for number in range(head * group, (head + 1) * group):
            for start in range(0, q.shape[1], chunk):
                part = q[number, start : start + chunk].float()
                weights = (part @ own_keys.float().T * sm_scale).softmax(-1)
                own = masses[number, start : start + chunk]
                own.scatter_add_(1, member[: len(part)], weights)
    return masses
