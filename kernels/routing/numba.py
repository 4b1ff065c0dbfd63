"""Scoring and selection on a CPU: one pass over the centroids, one over the lists."""

import ctypes
import functools
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from saap.kernels.cpu.emitter import LANES
from saap.kernels.cpu.functions import compiled, run, stamp_of

from . import numba_selection, numba_weights

_F32 = torch.float32
_NETWORK_DTYPES = ((_F32,) * 6, (_F32, _F32, _F32, _F32, torch.int8, _F32, _F32))


def cell_weights(
    q: Tensor,
    keys: Tensor,
    inv_freq: Tensor,
    sizes: Tensor,
    n_middle: Tensor,
    distance: Tensor,
    *,
    n_segments: int,
    network: tuple[Tensor, ...] | None,
    trained_share: float,
    interleaved: bool,
    share: str,
    by_size: bool,
) -> Tensor:
    """Predicted attention weight of one key of each cell, `[B, H, nlist * n_segments]` float32.

    See `saap.routing.LayerRouting`, whose torch code says the same; this reads centroids and
    network once and nothing else that is large.

    Args:
        q: de-RoPEd queries `[B, Hq, D]`.
        keys: typical de-RoPEd keys of the buckets, scaled as scores are, `[Hkv, nlist, D]`.
        inv_freq: radians a token of the pairs that RoPE turns, `[pairs]`.
        sizes: keys of each cell, int32 `[B or 1, Hkv, nlist * n_segments]`.
        n_middle, distance: keys in the cells, and how far the oldest is from the query, `[B]` or
            scalars.
        network: the tensors of `MLPRouter`, whose logits count by `trained_share`; or None.
            `mean, scale, w1, b1, w2, b2` float32; with `w2_scale` too, w2 is int8.
        share: "group": one row for the query heads of a KV head, `H = Hkv`; "head": `H = Hq`.
        by_size: weight of all keys of a cell.

    What it takes `can_weigh` says.
    """
    batch, n_heads, dim = q.shape
    heads, nlist = keys.shape[:2]
    group, hidden = n_heads // heads, network[2].shape[1] if network else 0
    q, keys, inv_freq, sizes = (t.contiguous() for t in (q.float(), keys, inv_freq, sizes))
    n_middle, distance = (t.expand(batch).double().contiguous() for t in (n_middle, distance))
    network = tuple(t.contiguous() for t in network) if network else ()
    rows = n_heads if share == "head" else heads
    out = torch.empty(batch, rows, nlist * n_segments)
    threads = min(torch.get_num_threads(), batch * heads)
    space = torch.empty(
        threads * numba_weights.workspace_floats(group, dim, nlist, n_segments, hidden)
    )
    addresses = [t.data_ptr() for t in network]
    addresses += [0] * (len(numba_weights.NETWORK) - len(addresses))
    job = numba_weights.Job(
        *addresses, q.data_ptr(), keys.data_ptr(), inv_freq.data_ptr(), sizes.data_ptr(),
        n_middle.data_ptr(), distance.data_ptr(), out.data_ptr(),
        batch, heads, group, dim, len(inv_freq), nlist, n_segments, hidden,
        interleaved, share == "head", by_size,
        0 if len(sizes) == 1 else 4 * sizes.stride(0),
        space.data_ptr(), 0, 0, trained_share,
    )  # fmt: skip
    run(_weigh(), ctypes.addressof(job), threads)
    return out


def can_weigh(q: Tensor, keys: Tensor, network: tuple[Tensor, ...] | None) -> bool:
    """Whether `cell_weights` takes these."""
    dims = (q.shape[-1], network[2].shape[1] if network else LANES)
    return (
        q.device.type == "cpu"
        and keys.dtype == torch.float32
        and (not network or tuple(t.dtype for t in network) in _NETWORK_DTYPES)
        and all(n % LANES == 0 and n for n in dims)
        and keys.shape[1] + 1 >= LANES
    )


def bucket_ranges(
    scores: Tensor,
    offsets: Tensor,
    *,
    nprobe: int | None = None,
    max_tokens: int | None = None,
    top_p: float | None = None,
    min_score: float | None = None,
    per_row: bool = False,
    first_row: int = 0,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """As `saap.index.lists.bucket_ranges`, on a CPU; lists that touch become one range.

    `scores [B, H, n]` float32, `offsets [B or 1, Hkv, n + 1]` int32. `out`: `starts, lengths
    [B, H, capacity]` int32 to write to, strided alike, of at least as many ranges as the bounds
    allow.
    Returns views of the ranges in use, of the row that has most of them.
    """
    batch, heads, n = scores.shape
    scores, offsets = scores.float().contiguous(), offsets.contiguous()
    if out is None:
        capacity = min(n, *(bound for bound in (nprobe, max_tokens) if bound is not None), n)
        out = tuple(torch.empty(batch, heads, capacity, dtype=torch.int32) for _ in range(2))
    starts, lengths = out
    threads = min(torch.get_num_threads(), batch * heads)
    counts = torch.zeros(batch * heads, dtype=torch.int64)
    space = torch.empty(threads * numba_selection.workspace_bytes(n), dtype=torch.uint8)
    job = numba_selection.Job(
        scores.data_ptr(), offsets.data_ptr(), starts.data_ptr(), lengths.data_ptr(),
        counts.data_ptr(), batch * heads, heads, offsets.shape[1], n, starts.shape[2],
        0 if len(offsets) == 1 else 4 * offsets.stride(0), 4 * starts.stride(1), first_row,
        -1 if nprobe is None else nprobe, -1 if max_tokens is None else max_tokens, per_row,
        space.data_ptr(), 0, 0, 2.0 if top_p is None else top_p,
        -math.inf if min_score is None else min_score,
    )  # fmt: skip
    run(_select(), ctypes.addressof(job), threads)
    most = int(counts.max())
    return starts[..., :most], lengths[..., :most]


@functools.cache
def _weigh() -> Callable:
    entry = numba_weights.entry(stamp_of(Path(__file__).parent))
    return compiled("scoring of cells", numba_weights.SIGNATURE, [entry])[0]


@functools.cache
def _select() -> Callable:
    entry = numba_selection.entry(stamp_of(Path(__file__).parent))
    return compiled("selection of lists", numba_selection.SIGNATURE, [entry])[0]
