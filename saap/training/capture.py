"""Handlers that take keys and attention masses from one layer while a model runs."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from saap import rope
from saap.budget import Budget
from saap.hf import LayerCall
from saap.hf.layerwise import StopLayer
from saap.index import kmeans
from saap.index.moments import MomentSums
from saap.kv import KVStore, attend_chunk
from saap.masses import attention_masses

from .plan import Plan

DENSE = Budget(max_tokens=0)  # of a store without a selector: everything is visited


@dataclass
class SampledKeys:
    """Keys of one layer, pieces of `[Hkv, n, D]`, and what is known of its attention."""

    derope: list[Tensor] = field(default_factory=list)
    rope: list[Tensor] = field(default_factory=list)
    moments: MomentSums = field(default_factory=MomentSums)
    inv_freq: Tensor | None = None
    interleaved: bool = False
    sm_scale: float = 1.0


class KeySampler:
    """Keeps the keys at `picked` positions of one sequence, and computes no attention.

    `with_rope`: also as the attention sees them.
    """

    def __init__(self, picked: Tensor, keep: SampledKeys, *, with_rope: bool):
        self.picked, self.keep, self.with_rope = picked, keep, with_rope
        self.length = 0

    def __call__(self, call: LayerCall) -> tuple[Tensor, Tensor]:
        first, self.length = self.length, self.length + call.k_rope.shape[2]
        rows = self.picked[(self.picked >= first) & (self.picked < self.length)] - first
        rows = rows.to(call.k_rope.device)
        self.keep.derope.append(call.k_derope[0][:, rows])
        if self.with_rope:
            self.keep.rope.append(call.k_rope[0][:, rows])
        self.keep.sm_scale = call.sm_scale
        self.keep.moments.add(call.q_rope[0], call.k_rope[0])
        if call.rope is not None and self.keep.inv_freq is None:
            self.keep.inv_freq = rope.frequencies(*call.rope).cpu()
            self.keep.interleaved = call.rope[0] in rope.INTERLEAVED
        raise StopLayer


class Targets:
    """What `n` queries of one layer looked at; filled in order.

    `q [Hq, n, D]` float32, `mass [Hq, n, nlist + 1]` float16, `sizes [Hkv, blocks, nlist]` and
    `block_of [n]` as in `saap.masses.Masses`.
    """

    def __init__(self, n: int):
        self.n, self.filled = n, 0
        self.q: Tensor | None = None
        self.mass: Tensor | None = None
        self._sizes: list[Tensor] = []
        self._block_of: list[Tensor] = []

    def add(self, q_derope: Tensor, masses) -> None:
        heads, new, dim = q_derope.shape[1:]
        if self.q is None:
            self.q = q_derope.new_empty(heads, self.n, dim, dtype=torch.float32)
            self.mass = q_derope.new_empty(
                heads, self.n, masses.buckets.shape[-1], dtype=torch.float16
            )
        n_blocks = sum(s.shape[1] for s in self._sizes)
        own = slice(self.filled, self.filled + new)
        self.q[:, own], self.mass[:, own] = q_derope[0], masses.buckets[0]
        self.filled += new
        self._sizes.append(masses.sizes[0])
        blocks = torch.arange(new, device=q_derope.device) // masses.block
        self._block_of.append(n_blocks + blocks)

    @property
    def sizes(self) -> Tensor:
        return torch.cat(self._sizes, 1)

    @property
    def block_of(self) -> Tensor:
        return torch.cat(self._block_of)


class DenseAttention:
    """Computes one layer's attention exactly, over all tokens of the sequence so far."""

    def __init__(self, capacity: int):
        self.store = KVStore(None, DENSE, capacity=capacity)

    def __call__(self, call: LayerCall) -> tuple[Tensor, Tensor]:
        self.store.append(call.k_rope, call.v, call.k_derope)
        n = self.store.length
        return attend_chunk(
            call.q_rope,
            self.store.k[:, :, :n],
            self.store.v[:, :, :n],
            sm_scale=call.sm_scale,
            softcap=call.softcap,
            sliding_window=call.sliding_window,
        )


class MassRecorder(DenseAttention):
    """Computes the true masses of one sequence's chosen queries inside the layer's attention.

    Without `output_needed` the attention itself, and what follows it in the layer, is left out.
    """

    def __init__(
        self,
        capacity: int,
        centroids: Tensor,
        plan: Plan,
        keep: Targets,
        *,
        n_sink: int,
        window: int,
        output_needed: bool,
    ):
        super().__init__(capacity)
        self.centroids, self.plan, self.keep = centroids, plan, keep
        self.n_sink, self.window, self.output_needed = n_sink, window, output_needed
        self.buckets: list[Tensor] = []

    def __call__(self, call: LayerCall) -> tuple[Tensor, Tensor]:
        found = None
        if self.output_needed:
            found = super().__call__(call)
        else:
            self.store.append(call.k_rope, call.v, call.k_derope)
        self.buckets.append(kmeans.assign(call.k_derope, self.centroids))
        self._record(call)
        if found is None:
            raise StopLayer
        return found

    def _record(self, call: LayerCall) -> None:
        n = self.store.length
        first = n - call.q_rope.shape[2]
        chosen = self.plan.chosen(first, n).to(call.q_rope.device)
        if len(chosen) == 0:
            return
        masses = attention_masses(
            call.q_rope[:, :, chosen - first],
            self.store.k[:, :, :n],
            torch.cat(self.buckets, -1),
            chosen,
            self.centroids.shape[1],
            sm_scale=call.sm_scale,
            n_sink=self.n_sink,
            window=self.window,
            softcap=call.softcap,
            sinks=call.sinks,
        )
        self.keep.add(call.q_derope[:, :, chosen - first], masses)
