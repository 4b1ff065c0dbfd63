"""Public scoring and selection: validates, chooses a backend, never falls back from an explicit
one.

Every backend is a module with the two operations and with `weights_limit`, `selection_limit`,
which name what of validated arguments it cannot do, or return None.
"""

from types import ModuleType
from typing import Literal

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor

from saap.kernels.backends import chosen

from . import validate

__all__ = ["Ranges", "cell_weights", "select_lists"]

Impl = Literal["reference", "numba"]
Share = Literal["group", "head"]
Ranges = tuple[Int32[Tensor, "B H R"], Int32[Tensor, "B H R"]]

BACKENDS = ("reference", "numba")


def cell_weights(
    q: Float[Tensor, "B Hq D"],
    keys: Float[Tensor, "Hkv nlist D"],
    inv_freq: Float[Tensor, " pairs"],
    sizes: Int32[Tensor, "B_or_1 Hkv cells"],
    n_middle: int | Int[Tensor, " B"],
    distance: int | Int[Tensor, " B"],
    *,
    n_segments: int,
    network: tuple[Tensor, ...] | None = None,
    trained_share: float = 0.5,
    interleaved: bool = False,
    share: Share = "group",
    by_size: bool = False,
    impl: Impl | None = None,
) -> Float[Tensor, "B H cells"]:
    """Predicted attention weight of one key of each cell, 0 where a cell is empty.

    A cell is one of the `n_segments` time segments of a bucket. Its score is that of the bucket's
    typical key, the query turned by RoPE to the mean age of the segment; with a network, the mean
    (weighted by `trained_share`) of it and the network's logit for the bucket. The softmax over
    all keys in cells is scaled to the mass that the network predicts for them; without one, to 1.

    Args:
        q: `[B, Hq, D]` de-RoPEd queries, one dtype of float32, bfloat16, float16, float64.
        keys: `[Hkv, nlist, D]` typical de-RoPEd keys of the buckets, scaled as scores are; `Hq`
            is a multiple of `Hkv`.
        inv_freq: `[pairs]` radians a token of the pairs that RoPE turns; at most `D / 2` of them,
            the other dimensions do not turn.
        sizes: int32 `[B, Hkv, nlist * n_segments]` keys of each cell, cells of a bucket together
            from old to new; `[1, ...]` for queries that share one context.
        n_middle, distance: keys in the cells, and tokens from the oldest of them to the query;
            numbers, or integer tensors `[B]`.
        network: `mean, scale [Hq, D]`, `w1 [Hq, hidden, D]`, `b1 [Hq, hidden]`,
            `w2 [Hq, nlist + 1, hidden]`, `b2 [Hq, nlist + 1]`, and, if w2 is int8,
            `w2_scale [Hq, nlist + 1]`; or None.
        trained_share: 0 to 1, the network's part in the blend.
        interleaved: RoPE turns dimensions 2i and 2i + 1 together; else i and i + pairs.
        share: "group": one row for the query heads of a KV head, their sum, `H = Hkv`; "head":
            `H = Hq`.
        by_size: weight of all keys of a cell, not of one.
        impl: `"reference"`, `"numba"` (CPU), or None, the best that can do it.

    Returns:
        float32 `[B, H, nlist * n_segments]`. No gradient.

    Raises:
        ValueError: an argument that does not fit, or that `impl` cannot do, naming its value and
            the limit.
    """
    validate.check_queries(q, keys, inv_freq)
    validate.check_cells(q, keys, sizes, n_segments)
    n_middle = validate.by_sequence("n_middle", n_middle, q)
    distance = validate.by_sequence("distance", distance, q)
    validate.check_network(network, q, keys)
    validate.check_blend(trained_share, share)
    arguments = (q, keys, inv_freq, sizes, n_middle, distance)
    backend = _backend(impl, q, "weights_limit", q, keys, inv_freq, network)
    weights = backend.cell_weights(
        *arguments,
        n_segments=n_segments,
        network=network,
        trained_share=trained_share,
        interleaved=interleaved,
        share=share,
        by_size=by_size,
    )
    return weights.float()


def select_lists(
    scores: Float[Tensor, "B H nlist"],
    offsets: Int32[Tensor, "B_or_1 Hkv nlist_plus_1"],
    *,
    nprobe: int | None = None,
    max_tokens: int | None = None,
    top_p: float | None = None,
    min_score: float | None = None,
    per_row: bool = False,
    first_row: int = 0,
    out: Ranges | None = None,
    impl: Impl | None = None,
) -> Ranges:
    """The best-scored lists within all of the bounds given, as ranges of list-sorted rows.

    Empty lists are never chosen. Of equal scores the first comes first; NaN comes after all
    numbers, weighs nothing, and is below any `min_score`. At least one bound is needed.

    Args:
        scores: `[B, H, nlist]` float32, bfloat16, float16 or float64; higher is visited first.
        offsets: int32 `[B, Hkv, nlist + 1]` or `[1, Hkv, nlist + 1]`, of which `H` is a multiple:
            list i holds rows `[first_row + offsets[i], first_row + offsets[i + 1])`.
        nprobe: so many lists, 1 to nlist.
        max_tokens: lists until so many rows are reached; the last is cut to its newest rows.
        top_p: above 0, at most 1: lists until their masses add up to that share of all masses. A
            mass is the score, with `per_row` the score times the size; below 0 it is 0.
        min_score: lists of at least that score.
        first_row: row at which list 0 begins.
        out: int32 `starts, lengths [B, H, capacity]` to write to, with room for
            `min(nlist, nprobe, max_tokens)` ranges; what is not used is set to 0.
        impl: `"reference"`, `"numba"` (CPU), or None, the best that can do it.

    Returns:
        `starts, lengths` int32 `[B, H, R]`: views of `out` if given. R is at most
        `min(nlist, nprobe, max_tokens)`, ranges of length 0 are unused. Their order, and whether
        lists that touch are one range, is left to the implementation.

    Raises:
        ValueError: an argument that does not fit, or that `impl` cannot do, naming its value and
            the limit. Values of `offsets` are checked on the CPU always, on a GPU if
            `SAAP_DEBUG=1`.
    """
    validate.check_lists(scores, offsets, first_row)
    validate.check_bounds(scores.shape[-1], nprobe, max_tokens, top_p, min_score)
    given = (bound for bound in (nprobe, max_tokens) if bound is not None)
    capacity = min(scores.shape[-1], *given, scores.shape[-1])
    validate.check_out(out, scores, capacity)
    backend = _backend(impl, scores, "selection_limit", scores, out)
    if out is None:
        shape = (*scores.shape[:2], capacity)
        starts, lengths = scores.new_empty((2, *shape), dtype=torch.int32)
        out = starts, lengths
    if scores.numel() == 0:
        return tuple(t.zero_()[..., :0] for t in out)
    return backend.select_lists(
        scores,
        offsets,
        nprobe=nprobe,
        max_tokens=max_tokens,
        top_p=top_p,
        min_score=min_score,
        per_row=per_row,
        first_row=first_row,
        out=out,
    )


def _backend(impl: str | None, like: Tensor, limit: str, *arguments) -> ModuleType:
    """The module to call, which `limit(*arguments)` must not refuse."""
    best = "numba" if like.device.type == "cpu" else "reference"
    return chosen(
        __package__, BACKENDS, impl, best, lambda module: getattr(module, limit)(*arguments)
    )  # fmt: skip
