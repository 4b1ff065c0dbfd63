"""Check the arguments of `api`: each error says what must hold and what was got."""

import math

import torch
from torch import Tensor

from saap.kernels.backends import values_are_checked

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LARGEST_ROW = 2**31 - 1

NETWORK = ("mean", "scale", "w1", "b1", "w2", "b2", "w2_scale")


def _check(name: str, tensor: Tensor, like: Tensor, dtypes, layout: str, fits: bool) -> None:
    if not fits:
        raise ValueError(f"{name} must be {layout}; got shape {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{name} must have dtype {names}; got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device}; got {tensor.device}")


def check_queries(q: Tensor, keys: Tensor, inv_freq: Tensor) -> None:
    """`q [B, Hq, D]`, `keys [Hkv, nlist, D]`, `inv_freq [pairs]`."""
    _check("q", q, q, DTYPES, "[B, Hq, D]", q.dim() == 3)
    heads, dim = q.shape[1:]
    layout = f"[Hkv, nlist, D] with D = {dim} and at least one bucket"
    fits = keys.dim() == 3 and keys.shape[2] == dim and keys.shape[1] > 0
    _check("keys", keys, q, DTYPES, layout, fits)
    kv_heads = keys.shape[0]
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ValueError(f"q must have a multiple of the {kv_heads} heads of keys; got {heads}")
    layout = f"[pairs] with at most D / 2 = {dim // 2} pairs"
    fits = inv_freq.dim() == 1 and 2 * len(inv_freq) <= dim
    _check("inv_freq", inv_freq, q, DTYPES, layout, fits)


def check_cells(q: Tensor, keys: Tensor, sizes: Tensor, n_segments: int) -> None:
    """`sizes [B or 1, Hkv, nlist * n_segments]`."""
    if not n_segments >= 1:
        raise ValueError(f"n_segments must be at least 1; got {n_segments}")
    kv_heads, nlist = keys.shape[:2]
    cells = (kv_heads, nlist * n_segments)
    layout = f"[B or 1, Hkv, nlist * n_segments] with B, Hkv, cells = {(len(q), *cells)}"
    fits = sizes.dim() == 3 and sizes.shape[0] in (1, len(q)) and sizes.shape[1:] == cells
    _check("sizes", sizes, q, (torch.int32,), layout, fits)


def by_sequence(name: str, number: int | Tensor, q: Tensor) -> Tensor:
    """A number, or one for each sequence, as a tensor `[B]` on q's device."""
    if not isinstance(number, Tensor):
        return torch.full((len(q),), number, device=q.device)
    if number.shape not in ((), (len(q),)) or number.is_floating_point():
        raise ValueError(
            f"{name} must be a number or integers [B] with B = {len(q)}; "
            f"got {number.dtype} {tuple(number.shape)}"
        )
    if number.device != q.device:
        raise ValueError(f"{name} must be on {q.device}; got {number.device}")
    return number.expand(len(q))


def check_network(network: tuple[Tensor, ...] | None, q: Tensor, keys: Tensor) -> None:
    """`mean, scale, w1, b1, w2, b2`, and `w2_scale` if w2 is int8."""
    if network is None:
        return
    if len(network) not in (6, 7):
        raise ValueError(f"network must be {', '.join(NETWORK)}, the last optional; got "
                         f"{len(network)} tensors")  # fmt: skip
    heads, dim, w1 = q.shape[1], q.shape[2], network[2]
    hidden, rows = w1.shape[1] if w1.dim() == 3 else 0, keys.shape[1] + 1
    wanted = ((dim,), (dim,), (hidden, dim), (hidden,), (rows, hidden), (rows,), (rows,))
    for name, tensor, shape in zip(NETWORK, network, wanted, strict=False):
        dtypes = (torch.int8,) if name == "w2" and len(network) == 7 else DTYPES
        shape = (heads, *shape)
        _check(f"network's {name}", tensor, q, dtypes, str(list(shape)), tensor.shape == shape)


def check_blend(trained_share: float, share: str) -> None:
    if not 0 <= trained_share <= 1:
        raise ValueError(f"trained_share must be in 0..1; got {trained_share}")
    if share not in ("group", "head"):
        raise ValueError(f"share must be 'group' or 'head'; got {share!r}")


def check_lists(scores: Tensor, offsets: Tensor, first_row: int) -> None:
    """`scores [B, H, nlist]`, `offsets [B or 1, Hkv, nlist + 1]`: shapes, not values."""
    _check("scores", scores, scores, DTYPES, "[B, H, nlist]", scores.dim() == 3)
    batch, heads, nlist = scores.shape
    layout = f"[B or 1, Hkv, nlist + 1] with B = {batch}, nlist = {nlist}"
    fits = offsets.dim() == 3 and offsets.shape[0] in (1, batch) and offsets.shape[2] == nlist + 1
    _check("offsets", offsets, scores, (torch.int32,), layout, fits)
    kv_heads = offsets.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"scores must have a multiple of the {kv_heads} heads of offsets; got {heads}"
        )
    if not 0 <= first_row <= LARGEST_ROW:
        raise ValueError(f"first_row must be in 0..{LARGEST_ROW}; got {first_row}")


def check_bounds(nlist, nprobe, max_tokens, top_p, min_score) -> None:
    """Check that at least one bound is given and that each is within its limits."""
    if nprobe is not None and not 1 <= nprobe <= nlist:
        raise ValueError(f"nprobe must be in 1..{nlist}; got {nprobe}")
    if max_tokens is not None and not 0 <= max_tokens < 2**62:
        raise ValueError(f"max_tokens must be at least 0 and below 2**62; got {max_tokens}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1; got {top_p}")
    if min_score is not None and math.isnan(min_score):
        raise ValueError(f"min_score must be a number; got {min_score}")
    if nprobe is None and max_tokens is None and top_p is None and min_score is None:
        raise ValueError("one of nprobe, max_tokens, top_p, min_score must be given; got none")


def check_out(out: tuple[Tensor, Tensor] | None, scores: Tensor, capacity: int) -> None:
    """`starts, lengths [B, H, at least capacity]` int32."""
    if out is None:
        return
    layout = f"[B, H, R] with B, H = {tuple(scores.shape[:2])} and R at least {capacity}"
    for name, tensor in zip(("starts", "lengths"), out, strict=True):
        fits = tensor.dim() == 3 and tensor.shape[:2] == scores.shape[:2]
        fits = fits and tensor.shape[2] >= capacity and tensor.shape == out[0].shape
        _check(f"out's {name}", tensor, scores, (torch.int32,), layout, fits)


def check_offset_values(offsets: Tensor, first_row: int) -> None:
    """Offsets begin at 0 or above, never decrease, and end at rows that int32 can count.

    On a GPU only under `SAAP_DEBUG=1`, because it waits for the GPU.
    """
    if not values_are_checked(offsets):
        return
    offsets = offsets.detach().cpu().long()
    for wrong, limit in (
        (offsets < 0, "at least 0"),
        (offsets + first_row > LARGEST_ROW, f"at most {LARGEST_ROW} with first_row {first_row}"),
        (offsets.diff(dim=-1, prepend=offsets[..., :1]) < 0, "at least the one before"),
    ):
        if wrong.any():
            at = tuple(wrong.nonzero()[0].tolist())
            raise ValueError(f"offsets{list(at)} must be {limit}; got {int(offsets[at])}")
