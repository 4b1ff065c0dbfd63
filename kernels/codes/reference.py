"""What `select_rows` says, in plain PyTorch: decode everything, score everything, sort."""

import functools

import torch
from torch import Tensor

from .layout import (
    COARSE_STEPS,
    COARSE_ZEROS,
    QUERY_MAX,
    WHOLE_STEPS,
    WHOLE_ZEROS,
    Codes,
    candidates_of,
    decode,
    decode_coarse,
    of_coordinates,
)
from .query_map import QueryMap


def select_rows(
    a: Tensor, codes: Codes, n_rows: list[int], *, max_tokens: int, n_candidates: int,
    one_of: int | None, query_map: QueryMap | None, min_weight: float | None,
    outside: Tensor | None, first_row: int, out: tuple[Tensor, Tensor], scored: Tensor,
    left_out: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`a [n, H, G, P]`, or with a map `[n, H, G, D]`: queries of the G heads that share each of
    the H selections."""
    if query_map is not None:
        a = query_map(a.flatten(1, 2)).unflatten(1, a.shape[1:3])
    starts, lengths = out
    starts.zero_()
    lengths.zero_()
    fine, coarse = decode(codes), decode_coarse(codes)
    if outside is None:
        outside = a.new_full(a.shape[:3], -torch.inf)
    outside = outside.reshape(a.shape[:3]).nan_to_num(nan=-torch.inf)
    of_heads = None if left_out is None else left_out.view(a.shape[:3])
    most = 0
    for i, own in enumerate(a):
        b = min(i, len(n_rows) - 1) if len(n_rows) > 1 else 0
        n = n_rows[b]
        for h, heads in enumerate(own):
            kv = h * fine.shape[1] // len(own)
            rows, scored[i, h], rest = chosen(
                heads.float(), fine[b, kv, :n], coarse[b, kv, :n], max_tokens,
                candidates_of(n, n_candidates, one_of), min_weight, outside[i, h],
            )  # fmt: skip
            if of_heads is not None:
                of_heads[i, h] = rest
            begins, counts = as_ranges(rows)
            starts[i, h, : len(begins)] = begins + first_row
            lengths[i, h, : len(begins)] = counts
            most = max(most, len(begins))
    return starts[..., :most], lengths[..., :most]


def chosen(
    q, fine, coarse, max_tokens: int, n_candidates: int, min_weight: float | None, outside: Tensor
) -> tuple[Tensor, int, Tensor]:
    """The rows, ascending, of equal ones the oldest; how many were scored by all of their code; of
    these that were not chosen the log-sum-exp of each head's scores."""
    n = len(fine)
    if max_tokens >= n and min_weight is None:
        return torch.arange(n, device=q.device), 0, q.new_full(q.shape[:1], -torch.inf)
    candidates = torch.arange(n, device=q.device)
    if n_candidates < n:
        scores = rounded(q, whole=False) @ coarse.T
        candidates = torch.cat([best(own, n_candidates) for own in scores]).unique()
    scores = rounded(q, whole=True) @ fine[candidates].T
    weight = torch.cat([scores, outside[:, None]], -1).softmax(-1)[:, :-1].sum(0)
    found = best(weight, max_tokens)
    if min_weight is not None:
        found = found[weight[found] >= min_weight]
    others = scores.index_fill(1, found, -torch.inf)
    return candidates[found], len(candidates), others.logsumexp(-1)


def rounded(q: Tensor, *, whole: bool) -> Tensor:
    """Queries as codes see them."""
    weights, _, factor = in_bytes(q, whole=whole)
    steps, _ = _steps_and_zeros(q, whole)
    return torch.where(steps > 0, weights * factor[..., None] / steps, 0)


def in_bytes(q: Tensor, *, whole: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `[..., P]` in whole numbers up to 127, `offset` and `factor [...]`:

    a score is `factor * scale * (weights . code - offset)`, with the whole or the coarse code.
    """
    steps, zeros = _steps_and_zeros(q, whole)
    largest = (q * steps).abs().amax(-1)
    usable = (largest > 0) & largest.isfinite()
    factor = torch.where(usable, largest / QUERY_MAX, 1)
    weights = (q * steps / factor[..., None]).round()
    weights = torch.where(usable[..., None], weights, 0)
    return weights, weights @ zeros, factor


def _steps_and_zeros(q: Tensor, whole: bool) -> tuple[Tensor, Tensor]:
    """How far neighbouring codes of each coordinate are apart; which code would stand for 0."""
    return tables(q.shape[-1], whole, q.device, q.dtype)


@functools.lru_cache(maxsize=64)
def tables(coordinates: int, whole: bool, device: torch.device, dtype: torch.dtype):
    groups = (WHOLE_STEPS, WHOLE_ZEROS) if whole else (COARSE_STEPS, COARSE_ZEROS)
    like = torch.empty(coordinates, device=device, dtype=dtype)
    return tuple(of_coordinates(own, like) for own in groups)


def best(key: Tensor, k: int) -> Tensor:
    if key.is_floating_point():
        key = torch.nan_to_num(key, nan=-torch.inf)
    order = key.argsort(descending=True, stable=True)
    return order[:k].sort().values


def as_ranges(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending rows as starts and lengths of runs."""
    if len(rows) == 0:
        return rows, rows
    begins = torch.cat([rows.new_ones(1, dtype=torch.bool), rows.diff() != 1])
    places = begins.nonzero()[:, 0]
    ends = torch.cat([places[1:], torch.full_like(places[:1], len(rows))])
    return rows[places], ends - places
