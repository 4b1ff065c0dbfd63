"""`add_rest` in torch, in the precision of the queries, at least float32."""

import torch
from torch import Tensor

from . import normal


def add_rest(
    out, lse, q, moments, lengths, sm_scale: float, max_tokens: int, min_weight: float
) -> tuple[Tensor, Tensor]:
    batch, heads, dim = q.shape
    n_kv = moments.means.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    scaled = (sm_scale * q.to(dtype)).unflatten(1, (n_kv, -1))  # [B, Hkv, G, D]
    means = moments.means.to(dtype)
    both = (scaled @ moments.spread.to(dtype)).flatten(1, 2)
    turned, tilt = both[..., :dim], both[..., dim:]
    mean = (scaled @ means[..., :dim, None]).flatten(1, 3)
    variance = (turned * scaled.flatten(1, 2)).sum(-1).clamp(min=normal.TINY)
    n = moments.n_rows.to(dtype)[:, None].expand(batch, heads)
    visited = lengths.sum(-1).to(dtype)
    together = heads // visited.shape[1]
    visited = visited.repeat_interleave(together, 1)
    most = together / visited.clamp(min=normal.LEAST_VISITED)
    if min_weight > 0:
        most = torch.where(visited < max_tokens, min_weight, most)
    bound = torch.where(lse == -torch.inf, torch.inf, lse.to(dtype) + most.log())
    log_rest, share = rest_of(n, visited, mean, variance, bound)
    value = means[..., dim:].repeat_interleave(heads // n_kv, 1) + share[..., None] * tilt
    usable = (n > visited) & log_rest.isfinite() & value.isfinite().all(-1)
    log_rest = torch.where(usable, log_rest, -torch.inf)
    value = torch.where(usable[..., None], value, 0.0)
    top = torch.maximum(lse.to(dtype), log_rest)
    top = torch.where(top.isfinite(), top, 0.0)
    before, added = (lse.to(dtype) - top).exp(), (log_rest - top).exp()
    total = before + added
    known = torch.where(before[..., None] > 0, out.to(dtype), 0.0)
    merged = (before[..., None] * known + added[..., None] * value) / total[..., None]
    merged = torch.where(usable[..., None], merged, out.to(dtype))
    whole = torch.where(usable, top + total.log(), lse.to(dtype))
    return merged.to(out.dtype), whole.to(lse.dtype)


def rest_of(
    n: Tensor, visited: Tensor, mean: Tensor, variance: Tensor, bound: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of the n - visited lower of n normal scores, all below `bound`, and c of
    `api`."""
    deviation = variance.sqrt()
    z = quantile(visited.clamp(min=normal.LEAST_VISITED) / n)
    x = torch.minimum(z, (bound - mean) / deviation) - deviation
    log_below = log_cdf(x)
    log_rest = n.log() + mean + variance / 2 + log_below
    ratio = (-x * x / 2 - normal.LOG_ROOT_2_PI - log_below).exp()
    return log_rest, 1 - ratio / deviation


def quantile(above: Tensor) -> Tensor:
    """What a normal number exceeds with this probability."""
    small = torch.minimum(above, 1 - above).clamp(min=1e-30)
    s = (-2 * small.log()).sqrt()
    a, b = normal.QUANTILE_TOP, normal.QUANTILE_BOTTOM
    top = a[0] + s * (a[1] + s * a[2])
    bottom = 1 + s * (b[0] + s * (b[1] + s * b[2]))
    z = s - top / bottom
    return torch.where(above > 0.5, -z, z)


def log_cdf(x: Tensor) -> Tensor:
    """log Phi(x)."""
    size = x.abs() / 2**0.5
    t = 1 / (1 + size / 2)
    series = torch.full_like(t, normal.ERFC[-1])
    for c in reversed(normal.ERFC[:-1]):
        series = c + t * series
    log_tail = t.log() + series - size * size - normal.LOG_2
    return torch.where(x > 0, torch.log1p(-log_tail.exp()), log_tail)
