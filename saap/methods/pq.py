"""Product quantization: the rows with the largest asymmetric inner products with coded keys.

Source: PQCache (Zhang et al., arXiv 2407.12820), over FAISS's `ProductQuantizer` (Jegou et al.,
TPAMI 2011). All codes are read in each step. A KV group adds its heads' attention weights by the
approximate scores.
"""

import math
from dataclasses import dataclass

import torch

from saap.index.faiss_backend import product_quantize

from .base import check_within
from .tokens import TokenChooser, TokenMethod, key_scores


@dataclass(frozen=True)
class PQBuild:
    """`dims`: dimensions a code stands for; `bits` of a code, fewer when there are few keys."""

    dims: int = 8
    bits: int = 6
    n_iter: int = 8

    def __post_init__(self):
        check_within(self, dims=(1, 4096), bits=(1, 16), n_iter=(1, 1000))


class PQChooser(TokenChooser):
    """Holds the keys as decoded: the asymmetric inner product is that with the decoded key."""

    def __init__(self, keys, build, seed):
        super().__init__(keys)
        dim = keys.k_rope.shape[-1]
        parts = dim // math.gcd(dim, build.dims)
        bits = max(1, min(build.bits, int(math.log2(max(2, self.n_middle)))))
        self.sm_scale = keys.layer.sm_scale
        self.decoded = keys.k_rope.float()
        if self.n_middle > 1:
            self.decoded = torch.stack(
                [
                    product_quantize(head, parts=parts, bits=bits, n_iter=build.n_iter, seed=seed)
                    for head in keys.k_rope
                ]
            )
        codes = self.n_middle * math.ceil(parts * bits / 8)
        codebooks = 2**bits * dim * 4
        self.nbytes = self.n_kv * (codes + codebooks)

    def scores(self, q_rope):
        return key_scores(q_rope, self.decoded, self.sm_scale)


class PQ(TokenMethod):
    name = "pq"
    follows = False

    def __init__(self, index=None, *, seed=0, build: PQBuild | None = None):
        super().__init__(index, seed=seed)
        self.build_options = build or PQBuild()

    def build(self, keys):
        return PQChooser(keys, self.build_options, self.seed)
