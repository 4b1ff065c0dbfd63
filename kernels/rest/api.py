"""Attention over the rows with the largest scores, and an estimate of all others.

Of the rows that a step does not visit it knows how many there are, and how keys and values of all
rows are spread: in clusters of near keys, each with its mean key and mean value, within which keys
and values vary together, in all clusters alike but for a factor. If keys were normally distributed
within a cluster, the scores of a query would be, too, those that are left out being the lower
ones; their attention in all and their mean value then follow in closed form. Scores are not quite
normal, but what is added up here are thousands of rows with little weight each.

For a query q (scaled) the scores `s = q.k` of cluster c have mean `m = q.E_c[k]` and variance
`v = f_c q.Cov(k, k) q`, and all scores together the mean M and the variance V. Of n rows the k
largest are visited, so the others lie below `t = M + sqrt(V) z`, z the normal quantile of
`1 - k / n`. Besides, none of them weighs more than the least of the visited ones, which is at most
the k-th part of all: where scores are far from normal, this bounds t. With Phi, phi the normal
distribution and density, `z_c = (t - m) / sqrt(v)` and `x = z_c - sqrt(v)`:

    log-sum-exp of the rest   log n_c + m + v / 2 + log Phi(x)
    mean score in it          m + h v,  h = 1 - phi(x) / (Phi(x) sqrt(v))
    mean value in it          E_c[v] + h f_c Cov(v, k) q

The rest as a whole is the clusters' parts, weighed by their sums.

Who chose the rows may have scored others (`Scored`): of those not chosen the log-sum-exp is known
then, but for the errors of these scores. They hold most of what the rest does. So its log-sum-exp
is theirs and that of the rows which were not scored; this follows as above, with the number of
each head's best rows among those scored for k. Then t is what the clusters' parts have that sum
below, and their mean value follows. Scores that err badly are bounded: none of the rows that were
left out weighs more than the least of the visited ones.

Scatterbrain (Chen et al., arXiv 2110.15343) adds a sparse and a low-rank part of attention, too;
RetroInfer (arXiv 2505.02922) estimates far clusters from their means.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saap.kernels import backends
from saap.kernels.backends.prepared import Preparation

from .scored import Scored

Impl = Literal["reference", "numba", "triton"]
BACKENDS = ("reference", "numba", "triton")
_DTYPES = {
    "spread": torch.bfloat16, "means": torch.float32, "keys": torch.bfloat16,
    "values": torch.bfloat16, "sizes": torch.float32, "n_rows": torch.int32,
}  # fmt: skip


@dataclass(frozen=True)
class Moments:
    """How the rows that a query may leave out are spread, for B sequences, in K clusters.

    `spread [B, Hkv, D, 2 D]` bfloat16: row i holds the covariance, within a cluster, of dimension
    i of a key with all dimensions of the key, then with those of the value. `means [B, Hkv, 2 D]`
    float32: the mean key of all, then the mean value. `keys [B, Hkv, D, K]` and `values [B, Hkv,
    K, D]` bfloat16: what the means of a cluster differ by from these. `sizes [B, Hkv, 2, K]`
    float32: a cluster's share of the rows, and the factor of `spread` in it. `n_rows [B]` int32:
    how many rows there are; where there are 0 nothing is estimated.
    """

    spread: Float[Tensor, "B Hkv D twice_D"]
    means: Float[Tensor, "B Hkv twice_D"]
    keys: Float[Tensor, "B Hkv D K"]
    values: Float[Tensor, "B Hkv K D"]
    sizes: Float[Tensor, "B Hkv 2 K"]
    n_rows: Int[Tensor, " B"]

    @property
    def nbytes(self) -> int:
        """Bytes that a step reads for each sequence."""
        return sum(part[0].nbytes for part in self.parts().values())

    def parts(self) -> dict[str, Tensor]:
        """All but `n_rows`, contiguous for each sequence."""
        own = {name: t for name, t in vars(self).items() if name != "n_rows"}
        return {n: t if t[0].is_contiguous() else t.contiguous() for n, t in own.items()}

    def expand(self, n: int) -> "Moments":
        """Those of one sequence, for n queries."""
        return Moments(*(t.expand(n, *t.shape[1:]) for t in vars(self).values()))


def add_rest(
    out: Float[Tensor, "B Hq D"],
    lse: Float[Tensor, "B Hq"],
    q: Float[Tensor, "B Hq D"],
    moments: Moments,
    lengths: Int[Tensor, "B H R"],
    *,
    sm_scale: float,
    max_tokens: int | None = None,
    min_weight: float | None = None,
    scored: Scored | None = None,
    impl: Impl | None = None,
) -> tuple[Float[Tensor, "B Hq D"], Float[Tensor, "B Hq"]]:
    """Add the estimated rest to attention over what was visited.

    Args:
        out, lse: attention over the visited rows, `lse` float32. May be written over.
        q: queries as attention sees them, RoPE included.
        lengths: int32, how many of the `n_rows` were visited, in ranges; their sum counts. H is
            Hkv, or Hq where each query head has its own.
        sm_scale: factor of the scores.
        max_tokens, min_weight: where fewer than `max_tokens` rows were visited, no other row has
            so large a share of the attention as `min_weight`, added over the heads that chose
            together. Either may be None.
        scored: what is known of rows that were not visited, for these queries; None: nothing.
        impl: `"reference"`, `"numba"` (CPU), `"triton"` (CUDA), or None, the best that can do it.

    Returns:
        `out` and `lse` of all rows. A query that is not finite, or whose rows were all visited,
        keeps what it had.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, and an `impl` that cannot do it.
    """
    _check(out, lse, q, moments, lengths)
    if scored is not None:
        scored.check(q, moments.spread.shape[1])
    best = "triton" if q.is_cuda else "numba"
    backend = backends.chosen(__package__, BACKENDS, impl, best, lambda m: m.refusal(out, q))
    bounds = _bounds(max_tokens, min_weight)
    return backend.add_rest(out, lse, q, moments, lengths, scored, sm_scale, *bounds)


class PreparedRest(Preparation):
    """`add_rest`, whose arguments but for the first three are the same from call to call.

    What `moments`, `lengths` and `scored` hold may change. Raises what `add_rest` raises.
    """

    def __init__(self, moments: Moments, lengths: Tensor, scored: Scored | None = None, **options):
        self._given, self._scored, self._options = (moments, lengths), scored, options
        self._prepared = None

    def fits(
        self, moments: Moments, lengths: Tensor, scored: Scored | None = None, **options
    ) -> bool:
        """Whether this was made for these very tensors, and options like these."""
        own, held = self._given
        return (
            moments is own and scored is self._scored and options == self._options
            and lengths.data_ptr() == held.data_ptr() and lengths.shape == held.shape
            and lengths.stride() == held.stride() and lengths.device == held.device
        )  # fmt: skip

    def __call__(self, out: Tensor, lse: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """`out, lse` of all rows; those that are given may be written over."""
        prepared = self._prepared
        if prepared is not None and prepared.fits(out, lse, q):
            return prepared(out, lse, q)
        found = add_rest(out, lse, q, *self._given, scored=self._scored, **self._options)
        options = self._options
        if options.get("impl") in (None, "numba") and backends.installed("numba"):
            from .numba import Prepared, refusal

            if refusal(out, q) is None:
                self._prepared = Prepared(
                    q, *self._given, self._scored, options["sm_scale"], *_bounds(**options)
                )
        return found

    def after(
        self, attend: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Attention of queries over what they visit, the rest added."""
        return lambda q: self(*attend(q), q)


def _bounds(
    max_tokens: int | None = None, min_weight: float | None = None, **_: object
) -> tuple[int, float]:
    """As the implementations take them."""
    return 2**31 - 1 if max_tokens is None else max_tokens, min_weight or 0.0


def _check(out: Tensor, lse: Tensor, q: Tensor, moments: Moments, lengths: Tensor) -> None:
    batch, heads, dim = q.shape
    spread = moments.spread
    n_kv = spread.shape[1]
    if out.shape != q.shape or lse.shape != q.shape[:2]:
        raise ValueError(
            f"out and lse must be {tuple(q.shape)} and {(batch, heads)}; got {tuple(out.shape)} "
            f"and {tuple(lse.shape)}"
        )
    if spread.shape != (batch, n_kv, dim, 2 * dim) or heads % max(1, n_kv):
        raise ValueError(
            f"spread must be [{batch}, Hkv, {dim}, {2 * dim}], {heads} query heads a multiple of "
            f"Hkv; got {tuple(spread.shape)}"
        )
    clusters = moments.keys.shape[-1]
    for name, shape in (
        ("means", (batch, n_kv, 2 * dim)), ("keys", (batch, n_kv, dim, clusters)),
        ("values", (batch, n_kv, clusters, dim)), ("sizes", (batch, n_kv, 2, clusters)),
    ):  # fmt: skip
        if getattr(moments, name).shape != shape:
            got = tuple(getattr(moments, name).shape)
            raise ValueError(f"{name} must be {shape}; got {got}")
    if len(moments.n_rows) != batch:
        raise ValueError(f"n_rows must be [{batch}]; got {tuple(moments.n_rows.shape)}")
    if len(lengths) != batch or lengths.shape[1] not in (n_kv, heads):
        raise ValueError(
            f"lengths must be [{batch}, {n_kv} or {heads}, R]; got {tuple(lengths.shape)}"
        )
    if lse.dtype != torch.float32:
        raise ValueError(f"lse must be float32; got {lse.dtype}")
    for name, dtype in _DTYPES.items():
        if getattr(moments, name).dtype != dtype:
            raise ValueError(
                f"{name} must be {str(dtype)[6:]}; got {getattr(moments, name).dtype}"
            )
    if lengths.dtype != torch.int32:
        raise ValueError(f"lengths must be int32; got {lengths.dtype}")
    devices = {t.device for t in (out, lse, q, lengths, *vars(moments).values())}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device; got {sorted(map(str, devices))}")
