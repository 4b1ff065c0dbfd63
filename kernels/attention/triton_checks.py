"""What the Triton backend refuses: each message names the limit and the value received."""

import torch
from torch import Tensor

from .triton_plan import MAX_GROUP, MAX_HEAD_DIM, Device

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
QUANTISED = (torch.int8, torch.float8_e4m3fn)
INT32_LIMIT = 2**31
LARGEST_TILE = 128
SMALLEST_TILE = 32


def check_device(q: Tensor, k: Tensor, device: Device, interpreted: bool) -> None:
    if q.device.type != "cuda" and not interpreted:
        raise ValueError(
            f"q is on {q.device}: impl 'triton' needs a CUDA device, or TRITON_INTERPRET=1 set "
            f"before triton is imported"
        )
    if interpreted:
        if q.dtype == torch.bfloat16:
            raise ValueError(
                "q has dtype torch.bfloat16: Triton's interpreter multiplies it wrongly, use "
                "float16 or float32"
            )
        return
    if device.capability < 80:
        raise ValueError(f"q is on an sm_{device.capability} GPU: impl 'triton' needs sm_80")
    if k.dtype == torch.float8_e4m3fn and device.capability < 89:
        raise ValueError(
            f"k has dtype {k.dtype} on an sm_{device.capability} GPU: it needs sm_89, use int8"
        )


def check_tensors(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> None:
    batch, q_heads, head_dim = q.shape
    if q.dtype not in DTYPES:
        raise ValueError(f"q has dtype {q.dtype}: it must be float16, bfloat16 or float32")
    if k.dtype != q.dtype and k.dtype not in QUANTISED:
        raise ValueError(
            f"k has dtype {k.dtype}: it must be q's, {q.dtype}, or int8 or float8_e4m3fn"
        )
    if k.dtype in QUANTISED and q.dtype == torch.float32:
        raise ValueError(f"q has dtype {q.dtype}: with {k.dtype} k it must have 16 bits")
    if head_dim % 16 or not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"head_dim is {head_dim}: it must be a multiple of 16 up to {MAX_HEAD_DIM}"
        )
    group_size = q_heads // starts.shape[1]
    if group_size > MAX_GROUP:
        raise ValueError(
            f"{group_size} query heads share a list of ranges: {MAX_GROUP} at most may"
        )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.stride(-1) != 1 and tensor.numel():
            raise ValueError(
                f"{name} has strides {tensor.stride()}: the last must be 1, D contiguous"
            )
    rows = k.shape[2]
    if rows > INT32_LIMIT - 2 * LARGEST_TILE:
        raise ValueError(f"N is {rows}: it must be at most {INT32_LIMIT - 2 * LARGEST_TILE}")
    tiles = batch * starts.shape[1] * (rows // SMALLEST_TILE + 1)
    if tiles >= INT32_LIMIT:
        raise ValueError(
            f"B x heads x N / {SMALLEST_TILE} is {tiles} tiles: it must be below {INT32_LIMIT}"
        )


def check_scales(k: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    quantised = k.dtype in QUANTISED
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (scale is not None) != quantised:
            given = "None" if scale is None else "given"
            wanted = "must be given" if quantised else "must be None"
            raise ValueError(f"{name} is {given} with k in {k.dtype}: it {wanted}")
        if scale is None:
            continue
        rows = tuple(k.shape[:3])
        fits = scale.dim() <= 3 and all(
            s in (1, r) for s, r in zip(scale.shape[::-1], rows[::-1], strict=False)
        )
        if scale.dtype != torch.float32 or scale.device != k.device or not fits:
            raise ValueError(
                f"{name} is {scale.dtype} {tuple(scale.shape)} on {scale.device}: it must be "
                f"float32, broadcastable to [B, Hkv, N] = {rows}, on {k.device}"
            )
