"""Saap decode: sinks, window and the selected rows of the middle, exact attention over them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from saap.kernels.attention.api import attend_ranges

from .budget import Budget
from .methods.base import LayerKeys, Method, Selector
from .prefill import DensePrefill, LayerCall
from .store import LayerStore, middle_bounds, with_local


class LayerDecoder:
    """Store and selector of one layer; `attend` is one decode step for one sequence."""

    def __init__(self, store: LayerStore, selector: Selector, budget: Budget):
        self.store, self.selector, self.budget = store, selector, budget

    @classmethod
    def from_cache(
        cls,
        layer: int,
        k_rope: Tensor,
        v: Tensor,
        k_derope: Tensor,
        method: Method,
        budget: Budget,
        *,
        n_heads: int,
        sm_scale: float,
        softcap: float | None = None,
        spare: int = 256,
    ) -> "LayerDecoder":
        """From a prefilled cache `[1, Hkv, N, D]`."""
        first, stop = middle_bounds(k_rope.shape[2], budget.n_sink, budget.window)
        selector = method.build(
            LayerKeys(
                layer,
                k_rope[:, :, first:stop],
                k_derope[:, :, first:stop],
                n_heads,
                sm_scale,
                softcap,
                k_rope.shape[2] - stop,
            )
        )
        store = LayerStore(
            k_rope,
            v,
            n_sink=budget.n_sink,
            window=budget.window,
            order=selector.order,
            spare=spare,
        )
        return cls(store, selector, budget)

    def ranges(self, q_rope: Tensor, q_derope: Tensor) -> tuple[Tensor, Tensor]:
        """All rows that queries `[n, Hq, D]` visit: sinks, tail and the selected buckets."""
        self.selector.ahead = self.store.length - self.store.n_context
        starts, lengths = self.selector.select(q_rope, q_derope, self.budget)
        return with_local(starts + self.store.first_middle, lengths, self.store.local_ranges())

    def attend(
        self, q_rope: Tensor, q_derope: Tensor, *, sm_scale: float, softcap: float | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`out [1, Hq, D]`, `lse [1, Hq]` and the number of rows visited `[1, H]`."""
        starts, lengths = self.ranges(q_rope, q_derope)
        k, v = (t[:, :, : self.store.length] for t in (self.store.k, self.store.v))
        out, lse = attend_ranges(q_rope, k, v, starts, lengths, sm_scale=sm_scale, softcap=softcap)
        return out, lse, lengths.sum(-1)


@dataclass
class Visited:
    """Rows and bytes visited, summed over decode steps and layers."""

    rows: float = 0.0
    cached: float = 0.0
    nbytes: float = 0.0
    steps: int = 0

    @property
    def selectivity(self) -> float:
        return self.rows / self.cached if self.cached else 1.0


class SparseDecode:
    """Handles attention after a dense prefill, one token at a time, for one sequence.

    Question and generated tokens both go through the method; the context was dense.
    """

    def __init__(self, prefill: DensePrefill, method: Method, budget: Budget, spare: int = 256):
        self.prefill, self.method, self.budget, self.spare = prefill, method, budget, spare
        self.layers: dict[int, LayerDecoder] = {}
        self.visited = Visited()

    def __call__(self, call: LayerCall) -> Tensor:
        if call.layer not in self.layers:
            self.layers[call.layer] = LayerDecoder.from_cache(
                call.layer,
                *self.prefill.caches[call.layer].views(),
                self.method,
                self.budget,
                n_heads=call.q_rope.shape[1],
                sm_scale=call.sm_scale,
                softcap=call.softcap,
                spare=self.spare,
            )
        layer = self.layers[call.layer]
        outs = []
        for t in range(call.q_rope.shape[2]):
            layer.store.append(call.k_rope[:, :, t : t + 1], call.v[:, :, t : t + 1])
            out, _, rows = layer.attend(
                call.q_rope[:, :, t],
                call.q_derope[:, :, t],
                sm_scale=call.sm_scale,
                softcap=call.softcap,
            )
            self._count(layer, rows)
            outs.append(out)
        return torch.stack(outs, 2)

    def _count(self, layer: LayerDecoder, rows: Tensor) -> None:
        store = layer.store
        row_bytes = store.k.shape[-1] * (store.k.element_size() + store.v.element_size())
        self.visited.rows += float(rows.float().mean())
        self.visited.cached += store.length
        self.visited.nbytes += float(rows.sum()) * row_bytes + layer.selector.nbytes
        self.visited.steps += 1
