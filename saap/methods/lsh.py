"""Locality-sensitive hashing: the rows whose signatures collide with the query's most often.

Source: MagicPIG (Chen et al., arXiv 2410.16179): SimHash with L tables of K hyperplanes over keys
from which their mean is taken. MagicPIG samples the colliding rows and reweights them; a selection
of fixed size has no use for that, so here rows are ranked by collisions, equals by recency. A KV
group adds its heads' collisions.
"""

from dataclasses import dataclass

import torch

from .base import check_within
from .tokens import TokenChooser, TokenMethod


@dataclass(frozen=True)
class LSHBuild:
    """`n_bits` hyperplanes a table (K, at most 15), `n_tables` tables (L)."""

    n_bits: int = 8
    n_tables: int = 75

    def __post_init__(self):
        check_within(self, n_bits=(1, 15), n_tables=(1, 4096))


class LSHChooser(TokenChooser):
    def __init__(self, keys, build, seed):
        super().__init__(keys)
        dim = keys.k_rope.shape[-1]
        generator = torch.Generator().manual_seed(seed + keys.layer.number)
        shape = dim, build.n_tables, build.n_bits
        planes = torch.randn(shape, generator=generator, dtype=torch.float32)
        self.planes = planes.to(keys.k_rope.device)
        centred = keys.k_rope.float() - keys.k_rope.float().mean(1, keepdim=True)
        self.signatures = self.sign(centred).movedim(-1, 0).contiguous()  # [L, Hkv, M]
        bits = build.n_tables * build.n_bits
        self.nbytes = self.n_kv * self.n_middle * ((bits + 7) // 8) + dim * bits * 4

    def sign(self, x):
        """The `n_tables` signatures of each vector, int16 `[..., L]`."""
        bits = torch.einsum("...d,dlk->...lk", x, self.planes) > 0
        weights = 2 ** torch.arange(bits.shape[-1], device=x.device)
        return (bits * weights).sum(-1).short()

    def scores(self, q_rope):
        queries = self.sign(q_rope.float()).unflatten(1, (self.n_kv, -1))  # [n, Hkv, G, L]
        shape = (*queries.shape[:3], self.n_middle)
        collisions = torch.zeros(shape, dtype=torch.int16, device=q_rope.device)
        for table, signatures in enumerate(self.signatures):
            collisions += queries[..., table, None] == signatures[:, None]
        recency = torch.arange(self.n_middle, dtype=torch.float32, device=q_rope.device)
        recency /= 16 * self.n_middle
        return collisions.flatten(1, 2) + recency

    def combine(self, scores, outside):
        return scores.unflatten(1, (self.n_kv, -1)).sum(2)


class LSH(TokenMethod):
    name = "lsh"
    weighs_heads = False

    def __init__(self, index=None, *, seed=0, build: LSHBuild | None = None):
        super().__init__(index, seed=seed)
        self.build_options = build or LSHBuild()

    def build(self, keys):
        return LSHChooser(keys, self.build_options, self.seed)
