"""Dense attention over a growing cache, in chunks, so that 100k+ tokens fit in memory."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from .chunks import attend_chunk


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
        return attend_chunk(
            call.q_rope,
            k,
            v,
            sm_scale=call.sm_scale,
            softcap=call.softcap,
            sliding_window=call.sliding_window,
        )[0]
