"""Check the input of a KV store: each ValueError says what must hold and what was got."""

import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from saap.kernels.attention.int8_rows import head_dim
from saap.kernels.attention.validate import check_is_tensor

KV_DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
    "int8": torch.int8,
}  # fmt: skip
"""What a store can hold keys and values as: those that attention kernels read as they are."""


def check_append(
    k_rope: Tensor,
    v: Tensor,
    k_derope: Tensor,
    mask: Tensor | None,
    *,
    lengths: list[int],
    held: Tensor | None,
    n_kv: int | None,
    kv_dtype: torch.dtype | None = None,
) -> None:
    """Check tokens for a store of sequences of these lengths with keys `held [B, Hkv, n, D]`.

    `n_kv`: KV heads of its selector's partition, None where it has none. `kv_dtype`: what keys and
    values are stored as, None for their own dtype.
    """
    for name, given in (("k_rope", k_rope), ("v", v), ("k_derope", k_derope)):
        check_is_tensor(name, given)
    if k_rope.ndim != 4 or 0 in k_rope.shape[:3]:
        raise ValueError(f"k_rope must be [B, Hkv, T, D], none empty; got {tuple(k_rope.shape)}")
    for name, given in (("v", v), ("k_derope", k_derope)):
        if given.shape != k_rope.shape or given.device != k_rope.device:
            raise ValueError(
                f"{name} must be like k_rope, {tuple(k_rope.shape)} on {k_rope.device}; got "
                f"{tuple(given.shape)} on {given.device}"
            )
    if v.dtype != k_rope.dtype:
        raise ValueError(f"v must be {k_rope.dtype}, as k_rope; got {v.dtype}")
    if torch.is_grad_enabled() and (k_rope.requires_grad or v.requires_grad):
        raise ValueError(
            "k_rope and v must require no gradient; got one that does: use torch.no_grad()"
        )
    if lengths:
        expected = (len(lengths), held.shape[1], head_dim(held), held.dtype, held.device)
        stored = kv_dtype or k_rope.dtype
        found = (len(k_rope), k_rope.shape[1], k_rope.shape[3], stored, k_rope.device)
        if expected != found:
            raise ValueError(
                "batch, heads, head_dim, dtype and device must be those of the store, "
                f"{expected}; "
                f"got {found}"
            )
    elif n_kv is not None and k_rope.shape[1] != n_kv:
        raise ValueError(f"k_rope must have {n_kv} heads, as the partition; got {k_rope.shape[1]}")
    if kv_dtype is not None:
        check_fits(k_rope, v, kv_dtype)
    if mask is not None:
        _check_mask(mask, k_rope, lengths)


def check_kv_dtype(kv_dtype: torch.dtype | None) -> None:
    if kv_dtype not in (None, *KV_DTYPES.values()):
        names = ", ".join(str(dtype) for dtype in KV_DTYPES.values())
        raise ValueError(f"kv_dtype must be None or one of {names}; got {kv_dtype!r}")


def check_fits(k_rope: Tensor, v: Tensor, kv_dtype: torch.dtype) -> None:
    """Keys and values survive being stored: nothing finite becomes infinite."""
    if kv_dtype.itemsize > k_rope.dtype.itemsize:
        raise ValueError(
            f"kv_dtype must be no wider than the model's {k_rope.dtype}; got {kv_dtype}"
        )
    largest = torch.finfo(torch.float32 if kv_dtype == torch.int8 else kv_dtype).max
    if largest >= torch.finfo(k_rope.dtype).max * 0.99:
        return
    for name, given in (("k_rope", k_rope), ("v", v)):
        found = float(given.abs().amax())
        if largest < found < float("inf"):
            raise ValueError(
                f"{name} must be within {largest:g} for kv_dtype {kv_dtype}; got {found:g}"
            )


def numbers_of(given: int | Sequence[int] | Tensor, batch: int) -> list[int]:
    """A number for each of `batch` sequences, where one was given for all or one for each."""
    each = given.tolist() if hasattr(given, "tolist") else given  # of NumPy and torch
    try:
        each = list(each) if isinstance(each, Iterable) else [each] * batch
        each = [operator.index(n) for n in each]
    except TypeError:
        each = []
    if len(each) != batch:
        raise ValueError(
            f"n_dropped must be a whole number, or one for each of {batch} sequences; got {given}"
        )
    return each


def check_query(
    q: Tensor, q_derope: Tensor, *, batch: int, n_new: int, n_kv: int, dim: int
) -> None:
    """Check queries `[B, Hq, T, D]` of the `n_new` last tokens of each of `batch` sequences, over
    `n_kv` KV heads of `dim` dimensions."""
    for name, given in (("q_rope", q), ("q_derope", q_derope)):
        check_is_tensor(name, given)
    if n_new == 0:
        raise ValueError("attend must follow the append of its tokens at once; got none since")
    if q.ndim != 4 or q.shape[1] == 0 or q.shape[1] % n_kv or q.shape[3] != dim:
        raise ValueError(
            f"q_rope must be [B, Hq, T, {dim}], Hq a multiple of the {n_kv} KV heads; got "
            f"{tuple(q.shape)}"
        )
    if q_derope.shape != q.shape:
        raise ValueError(
            f"q_derope must be like q_rope, {tuple(q.shape)}; got {tuple(q_derope.shape)}"
        )
    if q.shape[2] != n_new or len(q) != batch:
        raise ValueError(
            f"q must be of the {n_new} tokens appended last to {batch} sequences; got "
            f"{q.shape[2]} tokens and a batch of {len(q)}"
        )


def _check_mask(mask: Tensor, k_rope: Tensor, lengths: list[int]) -> None:
    if mask.shape != (k_rope.shape[0], k_rope.shape[2]):
        raise ValueError(
            f"mask must be [B, T] = {(k_rope.shape[0], k_rope.shape[2])}; got {tuple(mask.shape)}"
        )
    check_left_padded(mask, lengths or [0] * len(mask))


def check_left_padded(mask: Tensor, behind: list[int]) -> None:
    """New slots `[B, T]` bool of sequences that hold so many tokens: none is empty after one."""
    if (mask[:, 1:] < mask[:, :-1]).any() or any(
        n and not whole for n, whole in zip(behind, mask.all(1).tolist(), strict=True)
    ):
        raise ValueError("padding must be on the left; got a mask with padding after a token")
