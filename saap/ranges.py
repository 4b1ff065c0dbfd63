"""From scores of lists to ranges of rows, on whatever device they are."""

from jaxtyping import Float, Int
from torch import Tensor

from saap.index.lists import bucket_ranges, check_bounds
from saap.kernels.routing.api import backend

Ranges = tuple[Int[Tensor, "B H R"], Int[Tensor, "B H R"]]


def best_ranges(
    scores: Float[Tensor, "B H n_lists"],
    offsets: Int[Tensor, "B Hkv n_lists_plus_1"],
    *,
    nprobe: int | None = None,
    max_tokens: int | None = None,
    top_p: float | None = None,
    min_score: float | None = None,
    per_row: bool = False,
    first_row: int = 0,
    out: Ranges | None = None,
) -> Ranges:
    """As `saap.index.lists.bucket_ranges`, by the kernel where there is one.

    The order of the ranges is not told. `out`: `starts, lengths` int32, as large as the bounds
    can need, to be written to; what is in use of them is returned.
    """
    bounds = {"nprobe": nprobe, "max_tokens": max_tokens, "top_p": top_p, "min_score": min_score}
    options = {"per_row": per_row, "first_row": first_row}
    kernel = backend(scores.device)
    if kernel is not None:
        check_bounds(scores.shape[-1], **bounds)
        return kernel.bucket_ranges(scores, offsets, **bounds, **options, out=out)
    starts, lengths = bucket_ranges(scores, offsets, **bounds, **options)
    if out is None:
        return starts, lengths
    used = tuple(t[..., : starts.shape[-1]] for t in out)
    used[0].copy_(starts)
    used[1].copy_(lengths)
    return used
