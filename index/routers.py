"""Routers compute a score for each bucket from a de-RoPEd query, for all heads of a layer at once.

`CentroidRouter` is what IVF does; `LinearRouter` is the closed-form least-squares map from query
to bucket mass; `MLPRouter` is the classifier of Saap (arXiv 2502.08246, section 4.2). The learned
ones predict one class more than there are buckets: the mass that sinks and window take. This class
makes the scores of different query heads comparable, which a selection shared by a KV group needs.
"""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .lists import expand_heads


class Router(ABC):
    """Scores buckets; `nbytes` is the number of bytes that one decode step reads of it."""

    nlist: int
    n_heads: int | None = None
    """The number of query heads it was made for; None for any multiple of the KV heads."""

    @abstractmethod
    def mass(
        self, q: Float[Tensor, "B Hq D"], sizes: Int[Tensor, "B Hkv nlist"] | None = None
    ) -> Float[Tensor, "B Hq nlist"]:
        """Scores that grow with the expected attention mass of each bucket, float32.

        `sizes`: the number of keys in each bucket; if not given, all buckets count as equally
        large. Only `MLPRouter` uses it.
        """

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The tensors to save; the constructor takes them by the same names."""

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors().values())


class CentroidRouter(Router):
    """Scores by the inner product with the centroids of the head's KV head, as IVF does."""

    def __init__(self, centroids: Float[Tensor, "Hkv nlist D"]):
        self.centroids = centroids
        self.nlist = centroids.shape[1]

    def mass(self, q, sizes=None):
        own = q.float().unflatten(1, (len(self.centroids), -1))  # by KV head
        return torch.einsum("bhgd,hnd->bhgn", own, self.centroids.float()).flatten(1, 2)

    def tensors(self):
        return {"centroids": self.centroids}


class LinearRouter(Router):
    """Ridge regression from query to bucket mass: `weight [Hq, nlist, D]`, `bias [Hq, nlist]`."""

    def __init__(self, weight: Tensor, bias: Tensor):
        self.weight, self.bias = weight, bias
        self.n_heads, self.nlist = weight.shape[:2]

    def mass(self, q, sizes=None):
        return torch.einsum("bhd,hnd->bhn", q.float(), self.weight.float()) + self.bias.float()

    def tensors(self):
        return {"weight": self.weight, "bias": self.bias}


class MLPRouter(Router):
    """Predicts the attention weight that a key has on average in each bucket.

    A two-layer network `w2 @ silu(w1 @ q_hat + b1) + b2` gives `f_b` for each bucket and `o` for
    all that lies outside the middle (sinks and window); a bucket of n keys is predicted to hold

        n_b exp(f_b) / (exp(o) + sum over buckets of n exp(f))

    of the attention. The network is fitted to weight per key, so it stays valid for contexts whose
    buckets have other sizes than in training. `q_hat = (q - mean) * scale` standardises each
    head's queries. Shapes: `mean, scale [Hq, D]`, `w1 [Hq, hidden, D]`, `b1 [Hq, hidden]`,
    `w2 [Hq, nlist + 1, hidden]`, `b2 [Hq, nlist + 1]`; float32, or `w2` int8 with
    `w2_scale [Hq, nlist + 1]`.

    Source: the classifier of Saap, arXiv 2502.08246, section 4.2; the sizes are ours.
    """

    def __init__(self, mean, scale, w1, b1, w2, b2, w2_scale=None):
        self.mean, self.scale = mean, scale
        self.w1, self.b1, self.w2, self.b2, self.w2_scale = w1, b1, w2, b2, w2_scale
        self.n_heads, self.nlist = w2.shape[0], w2.shape[1] - 1

    def logits(self, q: Float[Tensor, "B Hq D"]) -> Float[Tensor, "B Hq nlist_plus_1"]:
        """`f` of each bucket, and last `o`."""
        x = ((q.float() - self.mean) * self.scale).transpose(0, 1)
        hidden = torch.nn.functional.silu(torch.baddbmm(self.b1[:, None], x, self.w1.mT))
        w2 = self.w2 if self.w2_scale is None else self.w2 * self.w2_scale[..., None]
        return torch.baddbmm(self.b2[:, None], hidden, w2.mT).transpose(0, 1)

    def quantized(self) -> "MLPRouter":
        """The same router with `w2` in 8 bits, which are a quarter of the bytes read per step."""
        scale = self.w2.abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        w2 = (self.w2 / scale[..., None]).round().to(torch.int8)
        return MLPRouter(self.mean, self.scale, self.w1, self.b1, w2, self.b2, scale)

    def mass(self, q, sizes=None):
        logits = self.logits(q)
        if sizes is not None:
            log_sizes = expand_heads(sizes, q.shape[1]).float().log()
            logits = torch.cat([logits[..., :-1] + log_sizes, logits[..., -1:]], -1)
        return logits.softmax(-1)[..., :-1]

    def tensors(self):
        names = ("mean", "scale", "w1", "b1", "w2", "b2", "w2_scale")
        return {n: getattr(self, n) for n in names if getattr(self, n) is not None}


TRAINABLE = ("mlp", "linear", "centroid")
"""Names of the routers that a user can train; the first is the default."""

ROUTERS: dict[str, type[Router]] = {
    "centroid": CentroidRouter,
    "linear": LinearRouter,
    "mlp": MLPRouter,
}
