"""`add_rest` on a GPU: one program for each query head, which reads its KV head's moments."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from saap.kernels.backends.launches import Launch, launch_all

from . import normal

A0, A1, A2 = (tl.constexpr(c) for c in normal.QUANTILE_TOP)
B0, B1, B2 = (tl.constexpr(c) for c in normal.QUANTILE_BOTTOM)
E0, E1, E2, E3, E4, E5, E6, E7, E8, E9 = (tl.constexpr(c) for c in normal.ERFC)
LOG_ROOT_2_PI, LOG_2 = tl.constexpr(normal.LOG_ROOT_2_PI), tl.constexpr(normal.LOG_2)
LEAST_VISITED, TINY = tl.constexpr(normal.LEAST_VISITED), tl.constexpr(normal.TINY)
REACH = tl.constexpr(normal.REACH)
SEARCHED = tl.constexpr(26)
"""Times that a range of scores is halved."""
ROOT_2 = tl.constexpr(1.4142135623730951)


def refusal(out: Tensor, q: Tensor) -> str | None:
    if out.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"impl 'triton' needs float32, float16 or bfloat16; got {out.dtype}"
    return None


def add_rest(
    out, lse, q, moments, lengths, scored, sm_scale: float, max_tokens: int, min_weight: float
) -> tuple[Tensor, Tensor]:
    out, lse, q = (t if t.is_contiguous() else t.contiguous() for t in (out, lse, q))
    about = scored, sm_scale, max_tokens, min_weight
    launch_all([launch(out, lse, q, moments, lengths, *about)], q)
    return out, lse


def launch(
    out, lse, q, moments, lengths, scored, sm_scale: float, max_tokens: int, min_weight: float
) -> Launch:
    batch, heads, dim = q.shape
    parts = moments.parts()
    n_kv, clusters = parts["keys"].shape[1], parts["keys"].shape[3]
    _, own, ranges = lengths.shape
    arguments = {
        "out": out, "lse": lse, "q": q, **parts, "n_rows": moments.n_rows, "lengths": lengths,
        **{f"{name}_batch": part.stride(0) for name, part in parts.items()},
        "rows_batch": moments.n_rows.stride(0), "length_batch": lengths.stride(0),
        "length_head": lengths.stride(1), "length_range": lengths.stride(2), "heads": heads,
        "group": heads // n_kv, "heads_of_a_list": heads // own, "ranges": ranges,
        "sm_scale": sm_scale, "max_tokens": max_tokens, "min_weight": min_weight,
        **_known(scored, lse, parts["means"], moments.n_rows, heads),
        "CLUSTERS": clusters, "CLUSTERS_BLOCK": triton.next_power_of_2(clusters), "DIM": dim,
        "DIM_BLOCK": triton.next_power_of_2(dim), "ROWS": 16, "RANGES_BLOCK": 256,
    }  # fmt: skip
    return Launch(_add, (batch * heads,), arguments, {"num_warps": 4})


def _known(scored, lse: Tensor, means: Tensor, counts: Tensor, heads: int) -> dict[str, object]:
    """Arguments of what is known of rows that were scored; others stand in where nothing is."""
    if scored is None:
        tensors, numbers = (lse, means, counts), (0, 1, 0, 0)
    else:
        tensors = tuple(t.contiguous() for t in (scored.lse, scored.mean, scored.n_scored))
        mean, n_scored = tensors[1:]
        numbers = (
            mean.stride(0) if len(mean) > 1 else 0, heads // n_scored.shape[1],
            min(scored.n_best, 2**31 - 1), min(scored.one_of or 0, 2**31 - 1),
        )  # fmt: skip
    names = "scored_lse", "scored_mean", "n_scored"
    own = "scored_mean_batch", "heads_of_a_count", "n_best", "one_of"
    return {
        **dict(zip(names, tensors, strict=True)), **dict(zip(own, numbers, strict=True)),
        "SCORED": scored is not None,
    }  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "sm_scale",
        "min_weight",
        "max_tokens",
        "ranges",
        "spread_batch",
        "means_batch",
        "keys_batch",
        "values_batch",
        "sizes_batch",
        "rows_batch",
        "scored_mean_batch",
        "n_best",
        "one_of",
    ]
)
def _add(
    out,
    lse,
    q,
    spread,
    means,
    keys,
    values,
    sizes,
    n_rows,
    lengths,
    spread_batch,
    means_batch,
    keys_batch,
    values_batch,
    sizes_batch,
    rows_batch,
    length_batch,
    length_head,
    length_range,
    heads,
    group,
    heads_of_a_list,
    ranges,
    sm_scale,
    max_tokens,
    min_weight,
    scored_lse,
    scored_mean,
    n_scored,
    scored_mean_batch,
    heads_of_a_count,
    n_best,
    one_of,
    SCORED: tl.constexpr,
    CLUSTERS: tl.constexpr,
    CLUSTERS_BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    RANGES_BLOCK: tl.constexpr,
):
    """Grid: (B * Hq,)."""
    query = tl.program_id(0)
    b = query // heads
    head = query % heads
    n = tl.load(n_rows + b * rows_batch)
    counts = lengths + b * length_batch + head // heads_of_a_list * length_head
    visited = 0
    for first in range(0, ranges, RANGES_BLOCK):
        place = first + tl.arange(0, RANGES_BLOCK)
        own = tl.load(counts + place * length_range, mask=place < ranges, other=0)
        visited += tl.sum(own, 0)
    if visited < n:
        dims = tl.arange(0, DIM_BLOCK)
        used = dims < DIM
        kv_head = (head // group).to(tl.int64)
        spread += b.to(tl.int64) * spread_batch + kv_head * (2 * DIM * DIM)
        own_means = means + b.to(tl.int64) * means_batch + kv_head * (2 * DIM) + dims
        q += query.to(tl.int64) * DIM
        out += query.to(tl.int64) * DIM
        turned = tl.zeros([DIM_BLOCK], tl.float32)
        tilt = tl.zeros([DIM_BLOCK], tl.float32)
        for first in range(0, DIM, ROWS):
            row = first + tl.arange(0, ROWS)
            factor = sm_scale * tl.load(q + row, mask=row < DIM, other=0.0).to(tl.float32)
            place = spread + row[:, None] * (2 * DIM) + dims[None, :]
            some = (row < DIM)[:, None] & used[None, :]
            of_keys = tl.load(place, mask=some, other=0.0).to(tl.float32)
            of_values = tl.load(place + DIM, mask=some, other=0.0).to(tl.float32)
            turned += tl.sum(factor[:, None] * of_keys, 0)
            tilt += tl.sum(factor[:, None] * of_values, 0)
        scaled = sm_scale * tl.load(q + dims, mask=used, other=0.0).to(tl.float32)
        mean = tl.sum(scaled * tl.load(own_means, mask=used, other=0.0), 0)
        variance = tl.sum(scaled * turned, 0)
        cluster = tl.arange(0, CLUSTERS_BLOCK)
        there = cluster < CLUSTERS
        keys += b.to(tl.int64) * keys_batch + kv_head * (DIM * CLUSTERS)
        off = tl.zeros([CLUSTERS_BLOCK], tl.float32)
        for first in range(0, DIM, ROWS):
            row = first + tl.arange(0, ROWS)
            factor = sm_scale * tl.load(q + row, mask=row < DIM, other=0.0).to(tl.float32)
            place = keys + row[:, None] * CLUSTERS + cluster[None, :]
            some = (row < DIM)[:, None] & there[None, :]
            off += tl.sum(factor[:, None] * tl.load(place, mask=some, other=0.0).to(tl.float32), 0)
        own_sizes = sizes + b.to(tl.int64) * sizes_batch + kv_head * (2 * CLUSTERS) + cluster
        share = tl.load(own_sizes, mask=there, other=0.0)
        factors = tl.load(own_sizes + CLUSTERS, mask=there, other=0.0)
        of_all = tl.maximum(variance + tl.sum(share * off * off, 0), TINY)
        counted = tl.maximum(visited.to(tl.float32), LEAST_VISITED)
        most = heads_of_a_list / counted
        by_weight = (min_weight > 0) & (visited < max_tokens)
        most = tl.where(by_weight, min_weight, most)
        before_lse = tl.load(lse + query)
        deviation = tl.sqrt(of_all)
        log_of_all = tl.log(n.to(tl.float32)) + mean
        own_variance = tl.maximum(variance * factors, TINY)
        known = before_lse
        best = counted
        seen = visited.to(tl.float32)
        of_scored = tl.full([], float("-inf"), tl.float32)
        if SCORED:
            seen = tl.load(n_scored + query // heads_of_a_count).to(tl.float32)
            best = tl.full([], 0, tl.int32) + n_best
            if one_of > 0:
                best = tl.maximum(best, (n + one_of - 1) // one_of)
            best = tl.minimum(best.to(tl.float32), seen)
            place = scored_mean + b.to(tl.int64) * scored_mean_batch + kv_head * DIM + dims
            shared = tl.sum(scaled * tl.load(place, mask=used, other=0.0), 0)
            # Not more than as many rows can have of which none has more than `most`.
            others = tl.maximum(seen - visited, 0.0) * most
            of_whole = tl.where(others < 1, others / tl.maximum(1 - others, 1e-30), float("inf"))
            cap = known + tl.log(tl.where(by_weight, of_whole, others))
            cap = tl.where(known > float("-inf"), cap, float("inf"))
            of_scored = tl.minimum(tl.load(scored_lse + query) + shared, cap)
            known = _log_of_both(known, of_scored)
        bound = known + tl.log(most) - mean
        bound = tl.where(known > float("-inf"), bound, float("inf"))
        reach = tl.minimum(_quantile(tl.maximum(best, LEAST_VISITED) / n) * deviation, bound)
        log_part, shift = _parts(reach, off, own_variance, share)
        log_rest = log_of_all + _log_sum(log_part)
        if SCORED:
            left = tl.maximum(n - seen, 0.0)
            unseen = tl.where(left > 0, log_rest + tl.log(left / (n - best)), float("-inf"))
            log_rest = _log_of_both(of_scored, unseen)
            reach = REACH * tl.sqrt(own_variance)
            low = tl.min(tl.where(there, off - reach, float("inf")), 0)
            high = tl.max(tl.where(there, off + own_variance + reach, float("-inf")), 0)
            for _ in range(SEARCHED):
                half = (low + high) / 2
                log_part, shift = _parts(half, off, own_variance, share)
                less = _log_sum(log_part) < log_rest - log_of_all
                low = tl.where(less, half, low)
                high = tl.where(less, high, half)
            log_part, shift = _parts(low, off, own_variance, share)
        largest = tl.max(log_part, 0)
        weight = tl.exp(log_part - largest)
        whole = tl.sum(weight, 0)
        share_of_tilt = tl.sum(tl.where(weight > 0, weight * factors * shift, 0.0), 0) / whole
        value = tl.load(own_means + DIM, mask=used, other=0.0) + share_of_tilt * tilt
        values += b.to(tl.int64) * values_batch + kv_head * (DIM * CLUSTERS)
        place = values + cluster[:, None] * DIM + dims[None, :]
        of_clusters = tl.load(place, mask=there[:, None] & used[None, :], other=0.0)
        value += tl.sum((weight / whole)[:, None] * of_clusters.to(tl.float32), 0)
        check = log_rest + share_of_tilt + tl.sum(value, 0)
        if tl.abs(check) < float("inf"):
            top = tl.maximum(before_lse, log_rest)
            before = tl.exp(before_lse - top)
            added = tl.exp(log_rest - top)
            total = before + added
            kept = tl.load(out + dims, mask=used, other=0.0).to(tl.float32)
            kept = tl.where(before > 0, kept * before, 0.0)
            found = (kept + added * value) / total
            tl.store(out + dims, found.to(out.dtype.element_ty), mask=used)
            tl.store(lse + query, top + tl.log(total))


@triton.jit
def _parts(most, off, variance, share):
    """Of each cluster, relative to all rows and the score of the mean key."""
    log_mean, shift = _below(most - off, variance)
    return tl.where(share > 0, log_mean + off + tl.log(share), float("-inf")), shift


@triton.jit
def _log_sum(parts):
    largest = tl.max(parts, 0)
    return largest + tl.log(tl.sum(tl.exp(parts - largest), 0))


@triton.jit
def _log_of_both(a, b):
    top = tl.maximum(a, b)
    shift = tl.where(top > float("-inf"), top, 0.0)
    return shift + tl.log(tl.exp(a - shift) + tl.exp(b - shift))


@triton.jit
def _quantile(above):
    """As `quantile` of the reference."""
    small = tl.maximum(tl.minimum(above, 1 - above), 1e-30)
    s = tl.sqrt(-2 * tl.log(small))
    z = s - (A0 + s * (A1 + s * A2)) / (1 + s * (B0 + s * (B1 + s * B2)))
    return tl.where(above > 0.5, -z, z)


@triton.jit
def _below(most, variance):
    """As `below` of the reference."""
    deviation = tl.sqrt(variance)
    z = most / deviation
    x = z - deviation
    size = tl.abs(x) / ROOT_2
    t = 1 / (1 + size / 2)
    series = E6 + t * (E7 + t * (E8 + t * E9))
    series = E0 + t * (E1 + t * (E2 + t * (E3 + t * (E4 + t * (E5 + t * series)))))
    tail = tl.log(t) + series - LOG_2
    above = tl.log(1 - tl.exp(tl.minimum(tail - size * size, -LOG_2)))
    log_mean = tl.where(x > 0, variance / 2 + above, z * deviation - z * z / 2 + tail)
    ratio = tl.where(x > 0, -size * size - above, -tail) - LOG_ROOT_2_PI
    return log_mean, 1 - tl.exp(ratio) / deviation
