"""Scoring and selection on a CPU: one pass over the centroids, one over the lists."""

import ctypes
import functools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from saap.kernels.cpu.emitter import LANES
from saap.kernels.cpu.functions import compiled, run, stamp_of

from . import numba_selection, numba_weights, validate

_ROUNDED_TO_F32 = (torch.float32, torch.bfloat16, torch.float16)


def weights_limit(
    q: Tensor, keys: Tensor, inv_freq: Tensor, network: tuple[Tensor, ...] | None
) -> str | None:
    """What of validated arguments of `cell_weights` this backend cannot do, or None."""
    if q.device.type != "cpu":
        return f"impl 'numba' needs the CPU; got q on {q.device}"
    if q.dtype not in _ROUNDED_TO_F32:
        return f"q must have dtype float32, bfloat16 or float16 for impl 'numba'; got {q.dtype}"
    tensors = {"keys": keys, "inv_freq": inv_freq}
    tensors |= {f"network's {n}": t for n, t in zip(validate.NETWORK, network or (), strict=False)}
    for name, tensor in tensors.items():
        dtype = torch.int8 if name == "network's w2" and len(network) == 7 else torch.float32
        if tensor.dtype != dtype:
            return f"{name} must have dtype {dtype} for impl 'numba'; got {tensor.dtype}"
    sizes = {"head_dim": q.shape[-1]} | ({"hidden": network[2].shape[1]} if network else {})
    for name, n in sizes.items():
        if n % LANES or n == 0:
            return f"{name} must be a multiple of {LANES} for impl 'numba'; got {n}"
    if network and keys.shape[1] + 1 < LANES:
        return (
            f"a network must have at least {LANES - 1} buckets for impl 'numba'; "
            f"got {keys.shape[1]}"
        )
    return None


def selection_limit(scores: Tensor, out: tuple[Tensor, Tensor] | None) -> str | None:
    """What of validated arguments of `select_lists` this backend cannot do, or None."""
    if scores.device.type != "cpu":
        return f"impl 'numba' needs the CPU; got scores on {scores.device}"
    if scores.dtype not in _ROUNDED_TO_F32:
        return (
            f"scores must have dtype float32, bfloat16 or float16 for impl 'numba'; "
            f"got {scores.dtype}"
        )
    if out is None:
        return None
    batch, heads, capacity = out[0].shape
    for name, tensor in zip(("starts", "lengths"), out, strict=True):
        of_batch, of_head, of_range = tensor.stride()
        if (
            tensor.stride() != out[0].stride()
            or tensor.is_neg()
            or (capacity > 1 and of_range != 1)
            or (batch > 1 and of_batch != heads * of_head)
            or (batch * heads > 1 and of_head < capacity)
        ):
            return (
                f"out's {name} must have rows evenly apart, like starts, for impl 'numba'; "
                f"got strides {tensor.stride()}"
            )
    return None


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
    """As `api.cell_weights`, whose validation, `weights_limit` included, is taken for granted.

    Reads centroids and network once and nothing else that is large. Returns float32.
    """
    batch, n_heads, dim = q.shape
    heads, nlist = keys.shape[:2]
    group, hidden = n_heads // heads, network[2].shape[1] if network else 0
    rows = n_heads if share == "head" else heads
    out = torch.empty(batch, rows, nlist * n_segments, dtype=torch.float32)
    if out.numel() == 0:
        return out
    q, keys, inv_freq, sizes = (_plain(t) for t in (q.float(), keys, inv_freq, sizes))
    n_middle, distance = (_plain(t.double()) for t in (n_middle, distance))
    network = tuple(_plain(t) for t in network) if network else ()
    threads = min(torch.get_num_threads(), batch * heads)
    space = torch.empty(
        threads * numba_weights.workspace_floats(group, dim, nlist, n_segments, hidden),
        dtype=torch.float32,
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


def select_lists(
    scores: Tensor,
    offsets: Tensor,
    *,
    nprobe: int | None,
    max_tokens: int | None,
    top_p: float | None,
    min_score: float | None,
    per_row: bool,
    first_row: int,
    out: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """As `api.select_lists`, whose validation, `selection_limit` included, is taken for granted.

    Ranges come in the order of the rows; lists that touch become one range. R is that of the row
    with most ranges.

    Raises:
        ValueError: offsets that are not, or (never after that validation) too many ranges for
            `out`, beyond which nothing is written.
    """
    batch, heads, n = scores.shape
    scores, offsets = _plain(scores.float()), _plain(offsets)
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
        # Compared with scores, which are float32.
        -math.inf if min_score is None else float(np.float32(min_score)),
    )  # fmt: skip
    run(_select(), ctypes.addressof(job), threads)
    found = counts.tolist()
    if min(found) < 0:
        validate.check_offset_values(offsets, first_row)
        raise ValueError(f"out must have room for the selection; got {starts.shape[2]} ranges")
    most = max(found)
    return starts[..., :most], lengths[..., :most]


def _plain(tensor: Tensor) -> Tensor:
    """The tensor as its memory says: without gaps, and with no sign still to be changed."""
    return tensor.detach().resolve_neg().contiguous()


@functools.cache
def _weigh() -> Callable:
    entry = numba_weights.entry(stamp_of(Path(__file__).parent))
    return compiled("scoring of cells", numba_weights.SIGNATURE, [entry])[0]


@functools.cache
def _select() -> Callable:
    entry = numba_selection.entry(stamp_of(Path(__file__).parent))
    return compiled("selection of lists", numba_selection.SIGNATURE, [entry])[0]
