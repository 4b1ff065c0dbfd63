"""Dense attention over a growing cache, in chunks, so that 100k+ tokens fit in memory."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class LayerCall:
    """What one attention layer was called with: T new tokens.

    `q_rope, q_derope [B, Hq, T, D]`, `k_rope, k_derope, v [B, Hkv, T, D]`. Keys and queries are as
    the attention sees them (after RoPE and any norm), and the same with RoPE taken off. `rope`:
    the variant in `saap.rope.VARIANTS` and the tables `cos, sin [B, T, r]`, None without RoPE.
    """

    layer: int
    q_rope: Tensor
    q_derope: Tensor
    k_rope: Tensor
    k_derope: Tensor
    v: Tensor
    sm_scale: float
    softcap: float | None = None
    sliding_window: int | None = None
    rope: tuple[str, Tensor, Tensor] | None = None


def causal_attention(
    q: Float[Tensor, "B Hq T D"],
    k: Float[Tensor, "B Hkv N D"],
    v: Float[Tensor, "B Hkv N D"],
    *,
    sm_scale: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    block: int = 1024,
) -> Float[Tensor, "B Hq T D"]:
    """Exact attention of the last T of N tokens, causal and aligned at the bottom right.

    The G query heads of a KV head share one pass over its keys. Memory is bounded by
    `G * block * N` scores where a mask is needed.
    """
    n, length = k.shape[2], q.shape[2]
    group = q.shape[1] // k.shape[1]
    if n == length and softcap is None and (sliding_window is None or n <= sliding_window):
        return torch.nn.functional.scaled_dot_product_attention(
            q,
            k.repeat_interleave(group, 1),
            v.repeat_interleave(group, 1),
            is_causal=True,
            scale=sm_scale,
        )
    out = torch.empty_like(q)
    for start in range(0, length, block):
        rows = torch.arange(start, min(start + block, length), device=q.device) + n - length
        stop = int(n - length + min(start + block, length))
        first = 0 if sliding_window is None else max(0, stop - block - sliding_window)
        columns = torch.arange(first, stop, device=q.device)
        visible = columns <= rows[:, None]
        if sliding_window is not None:
            visible &= columns > rows[:, None] - sliding_window
        packed = q[:, :, start : start + block].unflatten(1, (-1, group)).flatten(2, 3)
        keys, values = k[:, :, first:stop], v[:, :, first:stop]
        mask = visible.repeat(group, 1)
        if softcap is None:
            part = torch.nn.functional.scaled_dot_product_attention(
                packed, keys, values, attn_mask=mask, scale=sm_scale
            )
        else:
            scores = softcap * torch.tanh(packed @ keys.mT * (sm_scale / softcap))
            weights = scores.float().masked_fill(~mask, -torch.inf).softmax(-1)
            part = weights.to(values.dtype) @ values
        out[:, :, start : start + block] = part.unflatten(2, (group, -1)).flatten(1, 2)
    return out


class GrowingCache:
    """Keys (with and without RoPE) and values of one layer, preallocated, written in place."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.length = 0
        self._buffers: tuple[Tensor, ...] | None = None

    def append(self, *tensors: Float[Tensor, "B Hkv T D"]) -> None:
        """Add T tokens to each of the buffers, in the order of the first call."""
        if self._buffers is None:
            self._buffers = tuple(
                t.new_empty(t.shape[0], t.shape[1], self.capacity, t.shape[3]) for t in tensors
            )
        end = self.length + tensors[0].shape[2]
        if end > self.capacity:
            raise ValueError(f"{end} tokens: accepted are at most capacity={self.capacity}")
        for buffer, new in zip(self._buffers, tensors, strict=True):
            buffer[:, :, self.length : end] = new
        self.length = end

    def views(self) -> tuple[Float[Tensor, "B Hkv N D"], ...]:
        return tuple(buffer[:, :, : self.length] for buffer in self._buffers)


class DensePrefill:
    """Handles the attention of every layer exactly and keeps what it saw.

    `caches[layer].views()` are `k_rope, v, k_derope`. Use as the handler of `saap.hf.routed`.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.caches: dict[int, GrowingCache] = {}

    def __call__(self, call: LayerCall) -> Tensor:
        cache = self.caches.setdefault(call.layer, GrowingCache(self.capacity))
        cache.append(call.k_rope, call.v, call.k_derope)
        k, v, _ = cache.views()
        return causal_attention(
            call.q_rope,
            k,
            v,
            sm_scale=call.sm_scale,
            softcap=call.softcap,
            sliding_window=call.sliding_window,
        )
