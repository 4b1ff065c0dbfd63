"""Public choice of pages: validates, then dispatches."""

from typing import Literal

import torch
from torch import Tensor

from . import numba as numba_backend
from . import reference


def select_pages(
    q: Tensor,
    keys: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    counts: Tensor,
    *,
    sm_scale: float,
    sink_pages: int,
    window_pages: int,
    out: Tensor,
    impl: Literal["reference", "numba"] | None = None,
) -> None:
    """Write the pages that each request and KV head visits to `out`, in their order.

    A page counts by the largest attention weight of a token in it, a softmax over the pages for
    each query head, added over the heads of a KV group. The first `sink_pages` and the last
    `window_pages` pages are always taken; of equal pages the first comes first.

    Args:
        q: float32 `[R, Hq, D]`, queries as attention sees them.
        keys: float32 `[blocks, Hkv, D, N]`, transposed within a page, `[D, N]` contiguous.
        block_table: int32 `[R, pages]`; entries past a request's length hold anything.
        seq_lens: int32 `[R]`, tokens of each request, at least 1.
        counts: int32 `[R]`, pages to take, at least 1 and at most the pages of the request.
        sm_scale: what scores are multiplied by.
        out: int32 `[R, Hkv, most]`: entry `block * Hkv + head` for each page taken; what is
            beyond a request's count is left as it is.
        impl: `"reference"` or `"numba"`; None takes the second.

    Raises:
        ValueError: an argument that does not fit, naming its value.
    """
    if impl not in (None, "reference", "numba"):
        raise ValueError(f"impl must be None, reference or numba; got {impl!r}")
    if q.ndim != 3 or keys.ndim != 4 or q.shape[2] != keys.shape[2]:
        raise ValueError(
            f"q [R, Hq, D] and keys [blocks, Hkv, D, N] must fit; got {list(q.shape)} and "
            f"{list(keys.shape)}"
        )
    requests, n_heads, _ = q.shape
    _, n_kv, _, page = keys.shape
    if n_heads % n_kv:
        raise ValueError(f"query heads must be a multiple of {n_kv}; got {n_heads}")
    if q.dtype != torch.float32 or keys.dtype != torch.float32:
        raise ValueError(f"q and keys must be float32; got {q.dtype} and {keys.dtype}")
    if keys.stride()[2:] != (page, 1):
        raise ValueError(f"[D, N] of keys must be contiguous; got strides {keys.stride()}")
    for name, tensor, shape in (
        ("block_table", block_table, (requests, block_table.shape[-1])),
        ("seq_lens", seq_lens, (requests,)),
        ("counts", counts, (requests,)),
        ("out", out, (requests, n_kv, out.shape[-1])),
    ):
        if tensor.dtype != torch.int32 or tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} must be int32 {list(shape)}; got {tensor.dtype} {list(tensor.shape)}"
            )
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name} must be contiguous in its last dimension; got strides")
    pages = (seq_lens + page - 1) // page
    if requests == 0:
        return
    if int(seq_lens.min()) < 1 or int(pages.max()) > block_table.shape[1]:
        raise ValueError(
            f"seq_lens must be in 1..{block_table.shape[1] * page}; got {seq_lens.tolist()}"
        )
    if bool(((counts < 1) | (counts > pages)).any()) or int(counts.max()) > out.shape[2]:
        raise ValueError(
            f"counts must be at least 1 and at most a request's pages and {out.shape[2]}; got "
            f"{counts.tolist()}"
        )
    backend = reference if impl == "reference" else numba_backend
    backend.select_pages(
        q.contiguous() * sm_scale, keys, block_table, seq_lens, counts, sink_pages, window_pages,
        out,
    )  # fmt: skip
