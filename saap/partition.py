"""A partition of a prompt's own keys: routing without a trained index."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saap.index import kmeans
from saap.index.routers import CentroidRouter

from .defaults import N_SEGMENTS, default_nlist
from .routing import LayerRouting

KEYS_PER_BUCKET = 64  # that k-means looks at, at most


def partition_keys(
    k_derope: Float[Tensor, "B Hkv T D"],
    inv_freq: Float[Tensor, " pairs"] | None,
    *,
    sm_scale: float,
    interleaved: bool = False,
    mask: Bool[Tensor, "B T"] | None = None,
    nlist: int | None = None,
    seed: int = 0,
) -> LayerRouting:
    """Routing of one layer by cells of these keys, with nothing trained but k-means in torch.

    A cell is scored by its centroid, turned by RoPE to its age (`kmeans-cells`,
    docs/partitions.md).
    `k_derope`: keys with RoPE taken off; `mask`: those that are tokens; `inv_freq`: radians a
    token of the pairs that RoPE turns (`saap.rope.frequencies`), None for a layer without RoPE.
    `nlist`: buckets, by default as `saap.train` chooses by context. The same seed gives the same
    routing.
    """
    dim = k_derope.shape[-1]
    if inv_freq is not None and (inv_freq.ndim != 1 or 2 * len(inv_freq) > dim):
        raise ValueError(
            f"inv_freq must have at most head_dim / 2 = {dim // 2} frequencies; got "
            f"{list(inv_freq.shape)}"
        )
    keys = k_derope.transpose(0, 1)  # [Hkv, B, T, D]
    keys = keys.flatten(1, 2) if mask is None else keys[:, mask]
    nlist = default_nlist(k_derope.shape[2]) if nlist is None else nlist
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randperm(keys.shape[1], generator=generator)[: KEYS_PER_BUCKET * nlist]
    keys = keys[:, sample.to(keys.device)].float()
    centroids = kmeans.lloyd(keys, nlist, seed=seed)
    return LayerRouting(
        centroids,
        CentroidRouter(centroids),
        N_SEGMENTS,
        kmeans.mean_products(keys, centroids),
        keys.new_zeros(0) if inv_freq is None else inv_freq.to(keys.device),
        interleaved,
        sm_scale,
    )
