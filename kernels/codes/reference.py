"""What `select_rows` says, in plain PyTorch: decode everything, score everything, sort."""

import torch
from torch import Tensor

from .layout import BINS, BINS_PER_UNIT, Codes, decode, decode_coarse


def select_rows(
    a: Tensor, codes: Codes, n_rows: list[int], *, max_tokens: int, n_candidates: int,
    first_row: int, out: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`a [n, H, G, P]`: scaled queries of the G heads that share each of the H selections."""
    starts, lengths = out
    starts.zero_()
    lengths.zero_()
    fine, coarse = decode(codes), decode_coarse(codes)
    most = 0
    for i, own in enumerate(a):
        b = min(i, len(n_rows) - 1) if len(n_rows) > 1 else 0
        n = n_rows[b]
        for h, heads in enumerate(own):
            kv = h * fine.shape[1] // len(own)
            rows = chosen(
                heads.float(), fine[b, kv, :n], coarse[b, kv, :n], max_tokens, n_candidates
            )
            begins, counts = as_ranges(rows)
            starts[i, h, : len(begins)] = begins + first_row
            lengths[i, h, : len(begins)] = counts
            most = max(most, len(begins))
    return starts[..., :most], lengths[..., :most]


def chosen(q, fine, coarse, max_tokens: int, n_candidates: int) -> Tensor:
    """The rows, ascending; of equal ones the oldest."""
    n = len(fine)
    candidates = torch.arange(n)
    if n_candidates < n and max_tokens < n:
        scores = q @ coarse.T
        key = (scores - scores.logsumexp(-1, keepdim=True)).amax(0)
        distance = torch.nan_to_num(-key * BINS_PER_UNIT, nan=BINS - 1)
        candidates = best(-distance.clamp(max=BINS - 1).int(), n_candidates)
    scores = q @ fine[candidates].T
    weight = scores.softmax(-1).sum(0)
    return candidates[best(weight, max_tokens)]


def best(key: Tensor, k: int) -> Tensor:
    if key.is_floating_point():
        key = torch.nan_to_num(key, nan=-torch.inf)
    order = key.argsort(descending=True, stable=True)
    return order[:k].sort().values


def as_ranges(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending rows as starts and lengths of runs."""
    if len(rows) == 0:
        return rows, rows
    begins = torch.cat([torch.ones(1, dtype=torch.bool), rows.diff() != 1])
    places = begins.nonzero()[:, 0]
    ends = torch.cat([places[1:], torch.tensor([len(rows)])])
    return rows[places], ends - places
