"""What `api` refuses: each message names the argument, the value received and the limit."""

import math
import os

import numpy as np
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Shapes, dtypes and devices of `q [B, Hq, D]` and `k, v [B, Hkv, N, D]`."""
    for name, tensor, rank, layout in (
        ("q", q, 3, "[B, Hq, D]"),
        ("k", k, 4, "[B, Hkv, N, D]"),
        ("v", v, 4, "[B, Hkv, N, D]"),
    ):
        if tensor.dim() != rank:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: it must be {layout}")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}: q is on {q.device}")
    if v.shape != k.shape or v.dtype != k.dtype:
        raise ValueError(
            f"v is {v.dtype} {tuple(v.shape)}: it must be like k, {k.dtype} {tuple(k.shape)}"
        )
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[2]:
        raise ValueError(
            f"k has shape {tuple(k.shape)}: its B and D must be q's, {q.shape[0]} and {q.shape[2]}"
        )
    q_heads, kv_heads = q.shape[1], k.shape[1]
    if kv_heads == 0 or q_heads == 0 or q_heads % kv_heads:
        raise ValueError(f"q has {q_heads} heads: they must be a multiple of k's {kv_heads}")


def check_float_dtypes(q: Tensor, k: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k)):
        if tensor.dtype not in DTYPES:
            names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            raise ValueError(f"{name} has dtype {tensor.dtype}: it must be one of {names}")


def check_ranges(q: Tensor, k: Tensor, starts: Tensor, lengths: Tensor) -> None:
    """Form of `starts, lengths`; on a GPU their values only under `SAAP_DEBUG=1` (a sync)."""
    for name, tensor in (("starts", starts), ("lengths", lengths)):
        if tensor.dtype != torch.int32:
            raise ValueError(f"{name} has dtype {tensor.dtype}: it must be int32")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}: q is on {q.device}")
    batch, q_heads, kv_heads = q.shape[0], q.shape[1], k.shape[1]
    if starts.dim() != 3 or starts.shape[0] != batch or starts.shape[1] not in (kv_heads, q_heads):
        raise ValueError(
            f"starts has shape {tuple(starts.shape)}: it must be [B, Hkv, R] or [B, Hq, R] "
            f"with B = {batch}, Hkv = {kv_heads}, Hq = {q_heads}"
        )
    if lengths.shape != starts.shape:
        raise ValueError(
            f"lengths has shape {tuple(lengths.shape)}: it must be that of starts, "
            f"{tuple(starts.shape)}"
        )
    if starts.device.type == "cpu" or os.environ.get("SAAP_DEBUG") == "1":
        check_range_values(starts, lengths, k.shape[2])


def check_range_values(starts: Tensor, lengths: Tensor, rows: int) -> None:
    """Used ranges lie within `[0, rows)`; lengths are not negative; unused starts are free."""
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
                f"starts{list(at)} = {first[at]}, lengths{list(at)} = {count[at]}: {limit}"
            )


def check_prefix(prefix_k: Tensor, prefix_v: Tensor, k: Tensor) -> None:
    for name, tensor in (("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        if tensor.dim() != 3 or tensor.shape[::2] != k.shape[1::2]:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}: it must be [Hkv, P, D] with "
                f"Hkv = {k.shape[1]} and D = {k.shape[3]}"
            )
        if tensor.dtype != k.dtype or tensor.device != k.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}: it must be like k, "
                f"{k.dtype} on {k.device}"
            )


def check_scalars(sm_scale: float, softcap: float | None) -> None:
    if not math.isfinite(sm_scale):
        raise ValueError(f"sm_scale is {sm_scale}: it must be finite")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap is {softcap}: it must be None or finite and above 0")
