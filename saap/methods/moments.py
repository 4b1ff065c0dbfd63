"""Moments: buckets ranked by their attention mass to second order, log n + a.mu + a'Sigma a / 2.

With a = sm_scale q and the mean mu and covariance Sigma of a bucket's RoPE'd keys this is the log
of the mass of n Gaussian keys. The term in mu alone is Multipole Attention's (Hooper et al., arXiv
2506.13059); the second cumulant is that of COBS, which selects blocks by it. Sigma is kept as its
`rank` leading directions and the diagonal of the rest (`rank=0`: diagonal alone). `moments` does
this for the buckets of the trained partition, `moments-pages` for pages of 16 rows. A KV group
adds the masses as shares of each head; where the budget is rows, mass a row decides.
"""

from dataclasses import dataclass

import torch

from saap.index.kmeans import assign
from saap.index.lists import expand_heads, group_sum, invert

from .base import BucketSelector, Method
from .kmeans_online import bucket_means
from .pages import PAGE_SIZE, page_lists, page_of_row
from .tokens import key_scores


@dataclass(frozen=True)
class MomentsBuild:
    """`rank` leading directions of each covariance, by `n_iter` steps of subspace iteration."""

    rank: int = 0
    n_iter: int = 4


class MomentsSelector(BucketSelector):
    def __init__(self, keys, buckets, lists, build: MomentsBuild):
        super().__init__(lists)
        vectors = keys.k_rope[0].float()
        index = buckets[0].long()
        self.n_kv, self.sm_scale = vectors.shape[0], keys.sm_scale
        self.mean = bucket_means(vectors, index, lists)
        gathered = index[..., None].expand_as(vectors)
        centred = vectors - self.mean.gather(1, gathered)
        self.variance = bucket_means(centred**2, index, lists)
        self.directions = None
        held = [self.mean, self.variance]
        if build.rank:
            self.directions = leading_directions(centred, index, lists, build)
            self.variance -= (self.directions**2).sum(2)
            self.variance.clamp_(min=0)
            held.append(self.directions)
        # Tables are kept in the keys' precision; log n is one float a bucket.
        self.nbytes = sum(t.numel() for t in held) * keys.k_rope.element_size()
        self.nbytes += lists.sizes.numel() * 4

    def log_mass(self, q_rope):
        second = key_scores(q_rope.float() ** 2, self.variance, self.sm_scale**2)
        if self.directions is not None:
            flat = self.directions.flatten(1, 2)
            along = key_scores(q_rope, flat, self.sm_scale).unflatten(
                -1, self.directions.shape[1:3]
            )
            second = second + (along**2).sum(-1)
        sizes = expand_heads(self.lists.sizes.float(), q_rope.shape[1])
        return sizes.log() + key_scores(q_rope, self.mean, self.sm_scale) + second / 2

    def scores(self, q_rope, q_derope, budget):
        mass = self.log_mass(q_rope)
        if budget.share == "group":
            mass = group_sum(mass.softmax(-1), self.n_kv).log()
        if budget.max_tokens is None:
            return mass
        return mass - expand_heads(self.lists.sizes.float(), mass.shape[1]).clamp(min=1).log()


def leading_directions(centred, index, lists, build):
    """`[Hkv, nlist, rank, D]`: directions of largest variance, as long as its square root."""
    heads, _, dim = centred.shape
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(heads, lists.nlist, dim, build.rank, generator=generator).to(
        centred.device
    )
    basis = torch.linalg.qr(start)[0]
    head = torch.arange(heads, device=centred.device)[:, None]
    for step in range(build.n_iter + 1):
        along = torch.einsum("hmd,hmdr->hmr", centred, basis[head, index])
        spread = bucket_means((along[..., None, :] * centred[..., None]).flatten(2), index, lists)
        spread = spread.unflatten(-1, (dim, build.rank))  # Sigma @ basis
        if step < build.n_iter:
            basis = torch.linalg.qr(spread + 1e-12 * start)[0]
    # Nystrom: Sigma ~ (Sigma B) (B' Sigma B)^-1 (Sigma B)', never more than Sigma itself.
    small = basis.mT @ spread
    values, vectors = torch.linalg.eigh((small + small.mT) / 2)
    roots = values.clamp(min=0).sqrt()
    inverse = torch.where(roots > 1e-6, 1 / roots.clamp(min=1e-6), 0.0)
    return (spread @ vectors * inverse[..., None, :]).mT.contiguous()


class Moments(Method):
    name = "moments"

    def __init__(self, index=None, *, seed=0, build: MomentsBuild | None = None):
        super().__init__(index, seed=seed)
        self.build_options = build or MomentsBuild()

    def build(self, keys):
        centroids = self.index.layers[keys.layer].centroids
        buckets = assign(keys.k_derope, centroids)
        lists = invert(buckets, centroids.shape[1])
        return MomentsSelector(keys, buckets, lists, self.build_options)


class MomentsPages(Moments):
    name = "moments-pages"
    needs_index = False

    def build(self, keys):
        n_kv, n_middle = keys.k_rope.shape[1:3]
        lists = page_lists(n_middle, n_kv, PAGE_SIZE, keys.k_rope.device)
        buckets = page_of_row(n_middle, n_kv, PAGE_SIZE).to(keys.k_rope.device)
        return MomentsSelector(keys, buckets, lists, self.build_options)
