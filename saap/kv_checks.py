"""What a KV store accepts; everything else ends in a ValueError that says what would be."""

import torch
from torch import Tensor


def check_append(
    k_rope: Tensor,
    v: Tensor,
    k_derope: Tensor,
    mask: Tensor | None,
    *,
    lengths: list[int],
    held: Tensor | None,
    n_kv: int | None,
) -> None:
    """Tokens for a store of sequences of these lengths that holds keys `held [B, Hkv, n, D]`.

    `n_kv`: KV heads of its partition, None for a store that stays dense.
    """
    if k_rope.ndim != 4 or 0 in k_rope.shape[:3]:
        raise ValueError(
            f"k_rope has shape {tuple(k_rope.shape)}: accepted is [B, Hkv, T, D], none empty"
        )
    for name, given in (("v", v), ("k_derope", k_derope)):
        if given.shape != k_rope.shape or given.device != k_rope.device:
            raise ValueError(
                f"{name} is {tuple(given.shape)} on {given.device}: accepted is as k_rope, "
                f"{tuple(k_rope.shape)} on {k_rope.device}"
            )
    if torch.is_grad_enabled() and (k_rope.requires_grad or v.requires_grad):
        raise ValueError("k_rope or v requires a gradient: call the model in torch.no_grad()")
    if lengths:
        expected = (len(lengths), held.shape[1], held.shape[3], held.dtype, held.device)
        found = (len(k_rope), k_rope.shape[1], k_rope.shape[3], k_rope.dtype, k_rope.device)
        if expected != found or v.dtype != held.dtype:
            raise ValueError(
                f"batch, heads, head_dim, dtype and device are {found}: the store holds {expected}"
            )
    elif n_kv is not None and k_rope.shape[1] != n_kv:
        raise ValueError(f"k_rope has {k_rope.shape[1]} heads: the partition has {n_kv}")
    if mask is not None:
        _check_mask(mask, k_rope, lengths)


def _check_mask(mask: Tensor, k_rope: Tensor, lengths: list[int]) -> None:
    if mask.shape != (k_rope.shape[0], k_rope.shape[2]):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}: accepted is [B, T] = "
            f"{(k_rope.shape[0], k_rope.shape[2])}"
        )
    behind = lengths or [0] * len(mask)
    if (mask[:, 1:] < mask[:, :-1]).any() or any(
        n and not whole for n, whole in zip(behind, mask.all(1).tolist(), strict=True)
    ):
        raise ValueError("mask has padding after a token: accepted is padding on the left")
