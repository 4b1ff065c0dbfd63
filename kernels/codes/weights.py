"""Scores and weights of rows by their codes, for whoever chooses among more rows than these are.

`select_rows` scores and chooses. Where the rows of one context lie in several places, each place
scores its own, and the choice is made among all: by coarse scores that are those of `select_rows`
to the last bit, since many rows are alike by so short a code.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from saap.kernels.backends import installed

from . import reference
from .layout import Codes, decode, decode_coarse
from .query_map import QueryMap


def coarse_scores(
    q: Float[Tensor, "H G D"], codes: Codes, n: int, query_map: QueryMap, impl: str | None = None
) -> Float[Tensor, "H G n"]:
    """Scores of the first n rows for each query head, by coarse codes.

    Args:
        q: float32 queries of the G heads that share each of H selections; H is a multiple of the
            codes' Hkv.
        codes: of one sequence.
        n: rows, 1 to `codes.n`.
        query_map: of one sequence.
        impl: `"reference"`, `"numba"` (CPU), or None, the best that can do it.

    Returns:
        float32. Queries are rounded to bytes as in `select_rows`.
    """
    own = _numba(q, codes, n, impl)
    if own is not None:
        return own.coarse_scores(q, codes, n, query_map)
    mapped = query_map(q.flatten(0, 1)[None])[0].unflatten(0, q.shape[:2])
    return _scores(mapped, codes, n, whole=False)


def weigh_rows(
    q: Float[Tensor, "H G P"], codes: Codes, n: int, impl: str | None = None
) -> tuple[Float[Tensor, "H G n"], Float[Tensor, "H G"]]:
    """`exp(score - largest)` of the first n rows for each query head by all of their code, and the
    largest score. Args: as `coarse_scores`, but for queries in the coordinates of the codes."""
    own = _numba(q, codes, n, impl)
    if own is not None:
        return own.weigh_rows(q, codes, n)
    scores = _scores(q, codes, n, whole=True)
    largest = scores.amax(-1)
    return (scores - largest[..., None]).exp(), largest


def _numba(q, codes, n, impl):
    """The module for a CPU, if it is to be used."""
    if len(codes.scale) != 1 or not 1 <= n <= codes.n:
        raise ValueError(
            f"codes must be of one sequence with at least n = {n} rows, n at least 1; got "
            f"{tuple(codes.scale.shape)}"
        )
    if impl not in (None, "reference", "numba"):
        raise ValueError(f"impl must be None, 'reference' or 'numba'; got {impl!r}")
    if impl == "numba" or (impl is None and q.device.type == "cpu" and installed("numba")):
        from . import numba_weights

        return numba_weights
    return None


def _scores(q: Tensor, codes: Codes, n: int, *, whole: bool) -> Tensor:
    x = (decode if whole else decode_coarse)(codes)[0, :, :n]
    x = x.repeat_interleave(len(q) // len(x), 0)
    return reference.rounded(q, whole=whole) @ x.mT


def codes_of_rows(codes: Codes, rows: list[Tensor]) -> Codes:
    """The codes `[1, H, ...]` of the rows listed for each of H selections, padded by their first.

    H is a multiple of the codes' Hkv.
    """
    longest = max(1, max(len(own) for own in rows))
    n_kv, per_head = codes.scale.shape[1], len(rows) // codes.scale.shape[1]
    assert n_kv * per_head == len(rows)
    place = torch.zeros(len(rows), longest, dtype=torch.int64, device=codes.scale.device)
    for head, own in enumerate(rows):
        if len(own):
            place[head] = own[0]
            place[head, : len(own)] = own
    heads = [head // per_head for head in range(len(rows))]
    taken = list(zip(heads, place, strict=True))
    return Codes(
        torch.stack([codes.coarse[0, h][:, own] for h, own in taken])[None],
        torch.stack([codes.fine[0, h][own] for h, own in taken])[None],
        torch.stack([codes.scale[0, h][own] for h, own in taken])[None],
    )
