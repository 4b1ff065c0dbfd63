"""Check the arguments of `api`: each error says what must hold and what was got."""

import math

import numpy as np
import torch
from torch import Tensor

from saap.kernels.backends import values_are_checked

from .int8_rows import width

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check shapes, dtypes and devices of `q [B, Hq, D]` and `k, v [B, Hkv, N, D]`."""
    for name, tensor, rank, layout in (
        ("q", q, 3, "[B, Hq, D]"),
        ("k", k, 4, "[B, Hkv, N, D]"),
        ("v", v, 4, "[B, Hkv, N, D]"),
    ):
        check_is_tensor(name, tensor)
        if tensor.dim() != rank:
            raise ValueError(f"{name} must be {layout}; got {tuple(tensor.shape)}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on {q.device}, as q; got {tensor.device}")
    if v.shape != k.shape or v.dtype != k.dtype:
        raise ValueError(
            f"v must be like k, {k.dtype} {tuple(k.shape)}; got {v.dtype} {tuple(v.shape)}"
        )
    wide = width(q.shape[2], k.dtype)
    if k.shape[0] != q.shape[0] or k.shape[3] != wide:
        of_int8 = "" if wide == q.shape[2] else f", D + 4 = {wide} in int8"
        raise ValueError(
            f"k must have the B and D of q, {q.shape[0]} and {q.shape[2]}{of_int8}; got "
            f"{tuple(k.shape)}"
        )
    q_heads, kv_heads = q.shape[1], k.shape[1]
    if kv_heads == 0 or q_heads == 0 or q_heads % kv_heads:
        raise ValueError(f"q must have a multiple of the {kv_heads} heads of k; got {q_heads}")


def check_is_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")


def check_float_dtypes(q: Tensor, k: Tensor) -> None:
    for name, tensor, dtypes in (("q", q, DTYPES), ("k", k, (*DTYPES, torch.int8))):
        if tensor.dtype not in dtypes:
            names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise ValueError(f"{name} must have dtype {names}; got {tensor.dtype}")


def check_ranges(q: Tensor, k: Tensor, starts: Tensor, lengths: Tensor) -> None:
    """Check shape and dtype of `starts, lengths`."""
    for name, tensor in (("starts", starts), ("lengths", lengths)):
        check_is_tensor(name, tensor)
        if tensor.dtype != torch.int32:
            raise ValueError(f"{name} must have dtype int32; got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on {q.device}, as q; got {tensor.device}")
    batch, q_heads, kv_heads = q.shape[0], q.shape[1], k.shape[1]
    if starts.dim() != 3 or starts.shape[0] != batch or starts.shape[1] not in (kv_heads, q_heads):
        raise ValueError(
            f"starts must be [B, Hkv, R] or [B, Hq, R] with B = {batch}, Hkv = {kv_heads}, "
            f"Hq = {q_heads}; got {tuple(starts.shape)}"
        )
    if lengths.shape != starts.shape:
        raise ValueError(
            f"lengths must have the shape of starts, {tuple(starts.shape)}; got "
            f"{tuple(lengths.shape)}"
        )


def check_values(starts: Tensor, lengths: Tensor, rows: int) -> None:
    """As `check_range_values`, on a GPU only under `SAAP_DEBUG=1`: it waits for the GPU."""
    if values_are_checked(starts):
        check_range_values(starts, lengths, rows)


def check_range_values(starts: Tensor, lengths: Tensor, rows: int) -> None:
    """Check that ranges lie within `[0, rows)`; the start of a range of length 0 may be any."""
    if starts.numel() == 0:
        return
    first, count = starts.detach().cpu().numpy(), lengths.detach().cpu().numpy()
    # As unsigned numbers, two non-negative int32 add without wrapping.
    end = first.view(np.uint32) + count.view(np.uint32)
    if first.min() >= 0 and count.min() >= 0 and end.max() <= rows:
        return
    for wrong, limit in (
        (count < 0, "lengths must be at least 0"),
        ((count > 0) & (first < 0), "starts must be at least 0"),
        ((count > 0) & (end > rows), f"start + length must be at most N = {rows}"),
    ):
        if wrong.any():
            at = tuple(np.argwhere(wrong)[0].tolist())
            raise ValueError(
                f"{limit}; got starts{list(at)} = {first[at]}, lengths{list(at)} = {count[at]}"
            )


def check_prefix(prefix_k: Tensor, prefix_v: Tensor, k: Tensor) -> None:
    for name, tensor in (("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        check_is_tensor(name, tensor)
        if tensor.dim() != 3 or tensor.shape[::2] != k.shape[1::2]:
            raise ValueError(
                f"{name} must be [Hkv, P, D] with Hkv = {k.shape[1]} and D = {k.shape[3]}; got "
                f"{tuple(tensor.shape)}"
            )
        if tensor.dtype != k.dtype or tensor.device != k.device:
            raise ValueError(
                f"{name} must be like k, {k.dtype} on {k.device}; got {tensor.dtype} on "
                f"{tensor.device}"
            )


def check_scalars(sm_scale: float, softcap: float | None) -> None:
    if not math.isfinite(sm_scale):
        raise ValueError(f"sm_scale must be finite; got {sm_scale}")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap must be None, or finite and above 0; got {softcap}")
