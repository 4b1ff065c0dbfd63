"""Check what the Triton backend supports: each error says what must hold and what was got."""

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
            f"q must be on a CUDA device for impl 'triton'; got {q.device}: use one, or set "
            f"TRITON_INTERPRET=1 before triton is imported"
        )
    if interpreted:
        if q.dtype == torch.bfloat16:
            raise ValueError(
                "q must be float16 or float32 for Triton's interpreter, which multiplies bfloat16 "
                "wrongly; got torch.bfloat16"
            )
        return
    if device.capability < 80:
        raise ValueError(
            f"the GPU must be sm_80 or newer for impl 'triton'; got sm_{device.capability}"
        )
    if k.dtype == torch.float8_e4m3fn and device.capability < 89:
        raise ValueError(
            f"the GPU must be sm_89 or newer for k of {k.dtype}; got sm_{device.capability}: use "
            "int8"
        )


def check_tensors(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> None:
    batch, q_heads, head_dim = q.shape
    if q.dtype not in DTYPES:
        raise ValueError(f"q must have dtype float16, bfloat16 or float32; got {q.dtype}")
    if k.dtype != q.dtype and k.dtype not in QUANTISED:
        raise ValueError(
            f"k must have q's dtype, {q.dtype}, or int8 or float8_e4m3fn; got {k.dtype}"
        )
    if k.dtype in QUANTISED and q.dtype == torch.float32:
        raise ValueError(f"q must have a dtype of 16 bits with k of {k.dtype}; got {q.dtype}")
    if head_dim % 16 or not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be a multiple of 16 up to {MAX_HEAD_DIM}; got {head_dim}")
    group_size = q_heads // starts.shape[1]
    if group_size > MAX_GROUP:
        raise ValueError(
            f"at most {MAX_GROUP} query heads must share a list of ranges; got {group_size}"
        )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.stride(-1) != 1 and tensor.numel():
            raise ValueError(f"{name} must have stride 1 over D; got strides {tensor.stride()}")
    rows = k.shape[2]
    if rows > INT32_LIMIT - 2 * LARGEST_TILE:
        raise ValueError(f"N must be at most {INT32_LIMIT - 2 * LARGEST_TILE}; got {rows}")
    tiles = batch * starts.shape[1] * (rows // SMALLEST_TILE + 1)
    if tiles >= INT32_LIMIT:
        raise ValueError(
            f"B x heads x N / {SMALLEST_TILE} must be below {INT32_LIMIT} tiles; got {tiles}"
        )


def check_scales(k: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    quantised = k.dtype in QUANTISED
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (scale is not None) != quantised:
            given = "None" if scale is None else "a tensor"
            wanted = "must be given" if quantised else "must be None"
            raise ValueError(f"{name} {wanted} with k of {k.dtype}; got {given}")
        if scale is None:
            continue
        rows = tuple(k.shape[:3])
        fits = scale.dim() <= 3 and all(
            s in (1, r) for s, r in zip(scale.shape[::-1], rows[::-1], strict=False)
        )
        if scale.dtype != torch.float32 or scale.device != k.device or not fits:
            raise ValueError(
                f"{name} must be float32, broadcastable to [B, Hkv, N] = {rows}, on {k.device}; "
                f"got {scale.dtype} {tuple(scale.shape)} on {scale.device}"
            )
