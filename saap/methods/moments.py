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

from saap.index.lists import expand_heads, group_sum

from .base import Method, check_within
from .kmeans_online import bucket_means
from .lists import ListSelector
from .pages import PAGE_SIZE, page_lists, page_of_row
from .snapshot import BucketChooser, LayerKeys, SnapshotMethod
from .tokens import key_scores


@dataclass(frozen=True)
class MomentsBuild:
    """`rank` leading directions of each covariance, by `n_iter` steps of subspace iteration."""

    rank: int = 0
    n_iter: int = 4

    def __post_init__(self):
        check_within(self, rank=(0, 4096), n_iter=(0, 1000))


class Statistics:
    """Mean and covariance of the keys of each bucket of one sequence."""

    def __init__(self, vectors, buckets, sizes, sm_scale, build: MomentsBuild):
        """`vectors [Hkv, M, D]`, `buckets [Hkv, M]`, `sizes [Hkv, nlist]`."""
        element_size, vectors = vectors.element_size(), vectors.float()
        self.sizes, self.sm_scale = sizes, sm_scale
        self.mean = bucket_means(vectors, buckets, sizes)
        gathered = buckets.long()[..., None].expand_as(vectors)
        centred = vectors - self.mean.gather(1, gathered)
        self.variance = bucket_means(centred**2, buckets, sizes)
        self.directions = None
        held = [self.mean, self.variance]
        if build.rank:
            self.directions = leading_directions(centred, buckets.long(), sizes, build)
            self.variance -= (self.directions**2).sum(2)
            self.variance.clamp_(min=0)
            held.append(self.directions)
        # Tables are kept in the keys' precision; log n is one float a bucket.
        self.nbytes = sum(t.numel() for t in held) * element_size + sizes.numel() * 4

    def log_mass(self, q_rope):
        second = key_scores(q_rope.float() ** 2, self.variance, self.sm_scale**2)
        if self.directions is not None:
            flat = self.directions.flatten(1, 2)
            along = key_scores(q_rope, flat, self.sm_scale).unflatten(
                -1, self.directions.shape[1:3]
            )
            second = second + (along**2).sum(-1)
        sizes = expand_heads(self.sizes[None].float(), q_rope.shape[1])
        return sizes.log() + key_scores(q_rope, self.mean, self.sm_scale) + second / 2

    def scores(self, q_rope, budget):
        mass = self.log_mass(q_rope)
        if budget.share == "group":
            mass = group_sum(mass.softmax(-1), len(self.sizes)).log()
        if budget.max_tokens is None:
            return mass
        return mass - expand_heads(self.sizes[None].float(), mass.shape[1]).clamp(min=1).log()


def leading_directions(centred, buckets, sizes, build):
    """`[Hkv, nlist, rank, D]`: directions of largest variance, as long as its square root."""
    heads, _, dim = centred.shape
    generator = torch.Generator().manual_seed(0)
    shape = heads, sizes.shape[1], dim, build.rank
    start = torch.randn(shape, generator=generator, dtype=torch.float32).to(centred.device)
    basis = torch.linalg.qr(start)[0]
    head = torch.arange(heads, device=centred.device)[:, None]
    for step in range(build.n_iter + 1):
        along = torch.einsum("hmd,hmdr->hmr", centred, basis[head, buckets])
        spread = bucket_means(
            (along[..., None, :] * centred[..., None]).flatten(2), buckets, sizes
        )
        spread = spread.unflatten(-1, (dim, build.rank))  # Sigma @ basis
        if step < build.n_iter:
            basis = torch.linalg.qr(spread + 1e-12 * start)[0]
    # Nystrom: Sigma ~ (Sigma B) (B' Sigma B)^-1 (Sigma B)', never more than Sigma itself.
    small = basis.mT @ spread
    values, vectors = torch.linalg.eigh((small + small.mT) / 2)
    roots = values.clamp(min=0).sqrt()
    inverse = torch.where(roots > 1e-6, 1 / roots.clamp(min=1e-6), 0.0)
    return (spread @ vectors * inverse[..., None, :]).mT.contiguous()


class MomentsSelector(ListSelector):
    def __init__(self, layer, centroids, build: MomentsBuild):
        super().__init__(centroids)
        self.layer, self.build = layer, build

    def update(self, middle):
        super().update(middle)
        self.statistics = [
            Statistics(
                middle.keys_of(b), middle.lists[b, :, :n], self.sizes[b], self.layer.sm_scale,
                self.build,
            )
            for b, n in enumerate(middle.n_rows)
        ]  # fmt: skip
        self.nbytes = self.statistics[0].nbytes

    def scores(self, query, middle, budget):
        if len(self.statistics) == 1:
            return self.statistics[0].scores(query.q_rope, budget)
        return torch.cat(
            [own.scores(query.q_rope[b : b + 1], budget) for b, own in enumerate(self.statistics)]
        )


class Moments(Method):
    name = "moments"

    def __init__(self, index=None, *, seed=0, build: MomentsBuild | None = None):
        super().__init__(index, seed=seed)
        self.build_options = build or MomentsBuild()

    def selector(self, layer):
        return MomentsSelector(layer, self.layer_index(layer).centroids, self.build_options)


class PageMoments(BucketChooser):
    def __init__(self, keys: LayerKeys, build: MomentsBuild):
        super().__init__(page_lists(keys.n_rows, keys.n_kv, PAGE_SIZE, keys.k_rope.device))
        self.order = None
        pages = page_of_row(keys.n_rows, keys.n_kv, PAGE_SIZE).to(keys.k_rope.device)
        self.statistics = Statistics(
            keys.k_rope, pages, self.lists.sizes[0], keys.layer.sm_scale, build
        )
        self.nbytes = self.statistics.nbytes

    def scores(self, q_rope, budget):
        return self.statistics.scores(q_rope, budget)


class MomentsPages(SnapshotMethod):
    name = "moments-pages"

    def __init__(self, index=None, *, seed=0, build: MomentsBuild | None = None):
        super().__init__(index, seed=seed)
        self.build_options = build or MomentsBuild()

    def build(self, keys):
        return PageMoments(keys, self.build_options)
