"""`add_rest` in torch, in the precision of the queries, at least float32."""

import torch
from torch import Tensor

from . import normal


def add_rest(
    out, lse, q, moments, lengths, scored, sm_scale: float, max_tokens: int, min_weight: float
) -> tuple[Tensor, Tensor]:
    batch, heads, dim = q.shape
    n_kv = moments.means.shape[1]
    group = heads // n_kv
    dtype = torch.promote_types(q.dtype, torch.float32)
    scaled = (sm_scale * q.to(dtype)).unflatten(1, (n_kv, -1))  # [B, Hkv, G, D]
    means = moments.means.to(dtype)
    both = (scaled @ moments.spread.to(dtype)).flatten(1, 2)
    turned, tilt = both[..., :dim], both[..., dim:]
    mean = (scaled @ means[..., :dim, None]).flatten(1)
    variance = (turned * scaled.flatten(1, 2)).sum(-1)
    off = (scaled @ moments.keys.to(dtype)).flatten(1, 2)  # [B, Hq, K]
    share, factor = moments.sizes.to(dtype).repeat_interleave(group, 1).unbind(2)
    n = moments.n_rows.to(dtype)[:, None].expand(batch, heads)
    visited = lengths.sum(-1).to(dtype)
    together = heads // visited.shape[1]
    visited = visited.repeat_interleave(together, 1)
    by_weight = (visited < max_tokens) & (min_weight > 0)
    most = together / visited.clamp(min=normal.LEAST_VISITED)
    most = torch.where(by_weight, min_weight, most)
    known = lse.to(dtype)
    if scored is not None:
        seen = scored.n_scored.to(dtype).repeat_interleave(heads // scored.n_scored.shape[1], 1)
        shared = (scaled @ scored.mean.to(dtype)[..., None]).flatten(1)
        # Not more than as many rows can have of which none has more than `most`.
        others = (seen - visited).clamp(min=0) * most
        of_whole = torch.where(others < 1, others / (1 - others), torch.inf)
        cap = known + torch.where(by_weight, of_whole, others).log()
        cap = torch.where(known == -torch.inf, torch.inf, cap)
        of_scored = torch.minimum(scored.lse.to(dtype) + shared, cap)
        known = torch.logaddexp(known, of_scored)
    bound = torch.where(known == -torch.inf, torch.inf, known + most.log())
    of_all = (variance + (share * off**2).sum(-1)).clamp(min=normal.TINY)
    own_variance = (variance[..., None] * factor).clamp(min=normal.TINY)
    middle = mean[..., None] + off

    def below_score(most_score):
        """Log-sum-exp of each cluster's rows with no larger score, and h."""
        log_sum, h = below(most_score[..., None] - middle, own_variance)
        return log_sum + n.log()[..., None] + middle + share.log(), h

    def behind(k):
        """As `below_score`, of rows behind the k best of all."""
        z = quantile(k.clamp(min=normal.LEAST_VISITED) / n)
        return below_score(torch.minimum(mean + z * of_all.sqrt(), bound))

    if scored is None:
        parts, shift = behind(visited)
        log_rest = parts.logsumexp(-1)
    else:
        best = (n / scored.one_of).ceil() if scored.one_of else torch.zeros_like(n)
        best = best.clamp(min=scored.n_best).minimum(seen)
        unseen = behind(best)[0].logsumexp(-1) + ((n - seen) / (n - best)).log()
        log_rest = torch.logaddexp(of_scored, torch.where(seen < n, unseen, -torch.inf))
        deviation = own_variance.sqrt()
        low = (middle - normal.REACH * deviation).amin(-1)
        high = (middle + own_variance + normal.REACH * deviation).amax(-1)
        for _ in range(60):
            half = (low + high) / 2
            less = below_score(half)[0].logsumexp(-1) < log_rest
            low, high = torch.where(less, half, low), torch.where(less, high, half)
        parts, shift = below_score(low)
    weights = parts.softmax(-1)
    shift = (weights * shift * factor).sum(-1)
    own = (weights.unflatten(1, (n_kv, -1)) @ moments.values.to(dtype)).flatten(1, 2)
    value = means[..., dim:].repeat_interleave(group, 1) + own + shift[..., None] * tilt
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


def below(most: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the mean exponential of normal numbers about 0, where those above `most` count as
    nothing; and h of `api`."""
    deviation = variance.sqrt()
    z = most / deviation
    x = z - deviation
    size = x.abs() / 2**0.5
    t = 1 / (1 + size / 2)
    series = torch.full_like(t, normal.ERFC[-1])
    for c in reversed(normal.ERFC[:-1]):
        series = c + t * series
    scaled = t.log() + series - normal.LOG_2  # log Phi(-|x|) and x^2 / 2, which cancel below
    above = torch.log1p(-(scaled - size * size).clamp(max=-normal.LOG_2).exp())
    log_mean = torch.where(x > 0, variance / 2 + above, z * deviation - z * z / 2 + scaled)
    ratio = torch.where(x > 0, -size * size - above, -scaled) - normal.LOG_ROOT_2_PI
    return log_mean, 1 - ratio.exp() / deviation


def quantile(above: Tensor) -> Tensor:
    """What a normal number exceeds with this probability."""
    small = torch.minimum(above, 1 - above).clamp(min=1e-30)
    s = (-2 * small.log()).sqrt()
    a, b = normal.QUANTILE_TOP, normal.QUANTILE_BOTTOM
    top = a[0] + s * (a[1] + s * a[2])
    bottom = 1 + s * (b[0] + s * (b[1] + s * b[2]))
    z = s - top / bottom
    return torch.where(above > 0.5, -z, z)
