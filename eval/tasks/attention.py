"""Attention-level quality: captured queries against an indexed context, every layer and head.

The first N - Q tokens of a text are the context: prefilled densely, indexed. The last Q tokens are
the queries, as in decoding: query j sees the context and the j tokens before it.
"""

import torch
from torch import Tensor

from saap import hf
from saap.budget import Budget
from saap.kernels.attention.api import attend_ranges, merge_states
from saap.methods.base import LayerKeys
from saap.prefill import DensePrefill, LayerCall
from saap.store import LayerStore, middle_bounds

from ..arms import Arm, Point
from .base import Task, text_tokens


class QueryCapture(DensePrefill):
    """Dense prefill that also keeps the last `n_queries` queries of each layer."""

    def __init__(self, capacity: int, n_queries: int):
        super().__init__(capacity)
        self.n_queries = n_queries
        self.calls: dict[int, LayerCall] = {}

    def __call__(self, call):
        self.calls[call.layer] = call
        return super().__call__(call)

    def queries(self, layer: int) -> tuple[Tensor, Tensor]:
        """`q_rope, q_derope [n, Hq, D]`."""
        call = self.calls[layer]
        return tuple(
            q[0, :, -self.n_queries :].transpose(0, 1).contiguous()
            for q in (call.q_rope, call.q_derope)
        )


def capture(model, tokens: Tensor, n_queries: int) -> QueryCapture:
    taken = QueryCapture(len(tokens), n_queries)
    hf.run_chunks(model, tokens[None], taken, chunk=max(n_queries, 8192))
    return taken


class LayerProblem:
    """One layer's context and queries, with the exact answer, for any number of methods."""

    def __init__(self, taken: QueryCapture, layer: int, n_sink: int, window: int):
        self.call = taken.calls[layer]
        self.q_rope, self.q_derope = taken.queries(layer)
        self.k_rope, self.v, self.k_derope = taken.caches[layer].views()
        self.n_queries = taken.n_queries
        self.n_context = self.k_rope.shape[2] - self.n_queries
        self.n_sink, self.window = n_sink, window
        self.first, self.stop = middle_bounds(self.n_context, n_sink, window)
        self.n_kv = self.k_rope.shape[1]
        self.keys = LayerKeys(
            layer,
            self.k_rope[:, :, self.first : self.stop],
            self.k_derope[:, :, self.first : self.stop],
            self.q_rope.shape[1],
            self.call.sm_scale,
            self.call.softcap,
            self.n_context - self.stop,
        )
        device = self.k_rope.device
        everything = torch.tensor(
            [[[self.first, self.stop - self.first]]], dtype=torch.int32, device=device
        )
        everything = everything.expand(self.n_queries, self.n_kv, 2)
        self.local = self._attend(self.k_rope, self.v, *self._local_ranges())
        self.middle = self._attend(
            self.k_rope, self.v, everything[..., :1].contiguous(), everything[..., 1:].contiguous()
        )
        self.exact = merge_states(*self.middle, *self.local)

    def _local_ranges(self) -> tuple[Tensor, Tensor]:
        device = self.k_rope.device
        tail = self.n_context - self.stop + 1 + torch.arange(self.n_queries, device=device)
        starts = torch.tensor([0, self.stop], device=device).expand(self.n_queries, 2)
        lengths = torch.stack([torch.full_like(tail, self.first), tail], -1)
        shape = (self.n_queries, self.n_kv, 2)
        return tuple(t.int()[:, None].expand(shape).contiguous() for t in (starts, lengths))

    def _attend(self, k, v, starts, lengths):
        shape = (self.n_queries, -1, -1, -1)
        return attend_ranges(
            self.q_rope,
            k.expand(shape),
            v.expand(shape),
            starts,
            lengths,
            sm_scale=self.call.sm_scale,
            softcap=self.call.softcap,
        )

    def store_for(self, selector) -> LayerStore:
        context = (t[:, :, : self.n_context] for t in (self.k_rope, self.v))
        return LayerStore(
            *context, n_sink=self.n_sink, window=self.window, order=selector.order, spare=0
        )

    def attend(self, selector, store: LayerStore, budget: Budget):
        """`out, lse` of all that is visited, `lse` of the chosen rows, `lengths [n, H, R]`."""
        selector.ahead = 1 + torch.arange(self.n_queries, device=self.k_rope.device)
        starts, lengths = selector.select(self.q_rope, self.q_derope, budget)
        chosen = self._attend(store.k, store.v, starts + self.first, lengths)
        return *merge_states(*chosen, *self.local), chosen[1], lengths

    def output_errors(self, out: Tensor) -> Tensor:
        """`|out - exact| / |exact|` over all heads, `[n]`."""
        exact = self.exact[0].flatten(1)
        return (out.flatten(1) - exact).norm(dim=1) / exact.norm(dim=1)

    def measure(self, selector, store: LayerStore, budget: Budget) -> dict:
        """Sums over the queries, a value a query head; lists are `[Hq]`."""
        out, lse, chosen_lse, lengths = self.attend(selector, store, budget)
        exact_lse = self.exact[1]
        middle = (self.middle[1] - exact_lse).exp()
        caught = (chosen_lse - exact_lse).exp()
        local_rows = self._local_ranges()[1].sum(-1).float().mean()
        rows = lengths.sum(-1).float()
        row_bytes = 2 * self.k_rope.shape[-1] * self.k_rope.element_size()
        visited_rows = rows.mean() + local_rows
        heads_reading = lengths.shape[1]
        return {
            "queries": self.n_queries,
            "middle_mass": rounded(middle.sum(0)),
            "middle_caught": rounded(caught.sum(0)),
            "all_caught": rounded((lse - exact_lse).exp().sum(0)),
            "output_error": float(self.output_errors(out).sum()),
            "selectivity": float(visited_rows) / (self.n_context + (self.n_queries + 1) / 2),
            "bytes_read": float(visited_rows) * heads_reading * row_bytes + selector.nbytes,
            "router_bytes": selector.nbytes,
        }


def rounded(values: Tensor) -> list[float]:
    return [round(float(x), 6) for x in values]


class Attention(Task):
    """Recall and output error of every layer and head on held-out text."""

    name = "attention"

    def n_units(self, config):
        return config.n_texts

    def run_unit(self, bench, context, number):
        config = bench.config
        tokens = text_tokens(bench.tokenizer, bench.text, context, number, config.n_texts)
        points = bench.points(context - config.n_queries, config.budgets)
        records = evaluate(bench.model, tokens, points, config.n_queries)
        return records, bytes(tokens.to(torch.int32).numpy())


def evaluate(
    model, tokens: Tensor, arms_points: list[tuple[Arm, list[Point]]], n_queries: int
) -> list[dict]:
    """Records of every layer, arm and point for one text of token ids `[N]`."""
    taken = capture(model, tokens, n_queries)
    records = []
    for layer in sorted(taken.caches):
        problems: dict[tuple[int, int], LayerProblem] = {}
        for arm, points in arms_points:
            built = {}
            for point in points:
                layout = point.budget.n_sink, point.budget.window
                if layout not in problems:
                    problems[layout] = LayerProblem(taken, layer, *layout)
                problem = problems[layout]
                if layout not in built:
                    selector = arm.method.build(problem.keys)
                    built[layout] = selector, problem.store_for(selector)
                selector, store = built[layout]
                point.prepare(selector)
                measured = problem.measure(selector, store, point.budget)
                place = {"method": arm.label, "budget": point.label, "layer": layer}
                records.append({**place, **measured})
    return records
