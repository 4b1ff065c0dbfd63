"""Attention-level quality: captured queries against an indexed context, every layer and head.

The first N - Q tokens of a text are the context: prefilled densely, indexed in the store that
decoding uses. The last Q tokens are the queries, as in decoding: query j sees the context and the
j tokens before it.
"""

import dataclasses
from functools import cached_property

import torch
from torch import Tensor

from saap import hf
from saap.budget import Budget
from saap.kernels.attention.api import attend_ranges, merge_states
from saap.kv import KVStore
from saap.kv.ranges import LOCAL
from saap.methods import Method
from saap.selector import LayerInfo

from ..variants import Point, Variant
from .base import Task, text_tokens
from .needle_rows import Needles


class LayerProblem:
    """One layer's context and queries, with the exact answer, for any number of methods.

    `layout`: a budget whose sinks, window and flushes say which rows are the middle.
    """

    def __init__(self, read: hf.ReadContext, info: LayerInfo, layout: Budget):
        self.info, self.layout, self.read = info, layout, read
        self.q_rope, self.q_derope = read.queries[info.number]
        self.k_rope, self.v, self.k_derope = read.keys(info.number)
        self.n_queries = len(self.q_rope)
        # The latest queries of the context, from which a selector may learn; not those that ask.
        self.seen = read.latest[info.number][:, :, : -self.n_queries]
        self.n_context = self.k_rope.shape[2] - self.n_queries
        self.first = min(layout.n_sink, self.n_context)
        self.stop = self.first + layout.rows_in_lists(self.n_context)
        self.n_kv = self.k_rope.shape[1]
        device = self.k_rope.device
        own = 1 + torch.arange(self.n_queries, device=device)
        zero = torch.zeros_like(own)
        local = [(zero, zero + self.first), (zero + self.stop, self.n_context - self.stop + own)]
        self.local = self._attend(self.k_rope, self.v, *self._ranges(local))
        middle = [(zero + self.first, zero + self.stop - self.first)]
        self.middle = self._attend(self.k_rope, self.v, *self._ranges(middle))
        self.exact = merge_states(*self.middle, *self.local)

    @cached_property
    def needles(self) -> Needles:
        return Needles.of(
            self.q_rope,
            self.k_rope[0],
            self.exact[1],
            first=self.first,
            stop=self.stop,
            sm_scale=self.info.sm_scale,
            softcap=self.info.softcap,
        )

    def _ranges(self, pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        shape = (self.n_queries, self.n_kv, len(pairs))
        return tuple(
            torch.stack(parts, -1).int()[:, None].expand(shape).contiguous()
            for parts in zip(*pairs, strict=True)
        )

    def _attend(self, k, v, starts, lengths):
        shape = (self.n_queries, -1, -1, -1)
        return attend_ranges(
            self.q_rope,
            k.expand(shape),
            v.expand(shape),
            starts,
            lengths,
            sm_scale=self.info.sm_scale,
            softcap=self.info.softcap,
        )

    def store_for(self, method: Method, budget: Budget | None = None) -> KVStore:
        """The store of a decoder that has read the context."""
        rows = self.read.new_rows(self.info.number)
        store = KVStore(method.selector(self.info), budget or self.layout, rows=rows)
        store.append(*(t[:, :, : self.n_context] for t in self.keys))
        if store.selector is not None and self.seen.shape[2]:
            store.selector.observe(self.seen, [self.seen.shape[2]])
        return store

    @property
    def keys(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.k_rope, self.v, self.k_derope

    def attend(self, store: KVStore, budget: Budget):
        """`out` of a step, `lse` of all that it visits and of the chosen rows, and these: `starts,
        lengths [n, H, R]`."""
        positions = self.n_context + torch.arange(self.n_queries, device=self.k_rope.device)
        starts, lengths = store.select(
            self.q_rope, self.q_derope, budget, positions=positions, local_lse=self.local[1]
        )
        if starts.shape[-1] < LOCAL:  # nothing was chosen: everything is visited
            whole = self.first, self.stop - self.first
            self.rest_bytes = 0
            return *self.exact, self.middle[1], *(torch.full_like(lengths, n) for n in whole)
        info = self.info
        add = store.adds_rest(budget, lengths, info.sm_scale, info.softcap)
        starts, lengths = starts[..., LOCAL:], lengths[..., LOCAL:]
        chosen = self._attend(store.k, store.v, starts, lengths)
        out, lse = merge_states(*chosen, *self.local)
        self.rest_bytes = 0 if add is None else store.estimated.nbytes
        if add is not None:
            out = add(out, lse.clone(), self.q_rope)[0]
        return out, lse, chosen[1], starts, lengths

    @property
    def local_rows(self) -> float:
        """Rows that a query visits in any case, the mean over the queries."""
        return self.first + self.n_context - self.stop + (self.n_queries + 1) / 2

    def output_errors(self, out: Tensor) -> Tensor:
        """`|out - exact| / |exact|` over all heads, `[n]`."""
        exact = self.exact[0].flatten(1)
        return (out.flatten(1) - exact).norm(dim=1) / exact.norm(dim=1)

    def measure(self, store: KVStore, budget: Budget) -> dict:
        """Sums over the queries, a value for each query head; lists are `[Hq]`."""
        out, lse, chosen_lse, starts, lengths = self.attend(store, budget)
        exact_lse = self.exact[1]
        middle = (self.middle[1] - exact_lse).exp()
        caught = (chosen_lse - exact_lse).exp()
        rows = lengths.sum(-1).float()
        visited_rows = float(rows.mean()) + self.local_rows
        choosing = store.selector.nbytes
        tokens = store.rows.tokens[0, :, : store.length]
        return {
            "queries": self.n_queries,
            "middle_mass": rounded(middle.sum(0)),
            "middle_caught": rounded(caught.sum(0)),
            "all_caught": rounded((lse - exact_lse).exp().sum(0)),
            "needle_mass": rounded(self.needles.mass),
            "needle_lost": rounded(self.needles.lost(tokens, starts, lengths)),
            "output_error": float(self.output_errors(out).sum()),
            "selectivity": visited_rows / (self.n_context + (self.n_queries + 1) / 2),
            "bytes_read": visited_rows * lengths.shape[1] * store.row_bytes
            + choosing
            + self.rest_bytes,
            "router_bytes": choosing,
        }


def rounded(values: Tensor) -> list[float]:
    return [round(float(x), 6) for x in values]


class Attention(Task):
    """Recall and output error of every layer and head on held-out text."""

    name, budgets = "attention", "budgets"

    def n_units(self, config):
        return config.n_texts

    def context_rows(self, config, context):
        return context - config.n_queries

    def run_unit(self, bench, context, number):
        config = bench.config
        tokens = text_tokens(bench.tokenizer, bench.text, context, number, config.n_texts)
        points = bench.points(self.context_rows(config, context), config.budgets)
        records = evaluate(bench.model, tokens, points, config.n_queries)
        return records, bytes(tokens.to(torch.int32).numpy())


def evaluate(
    model, tokens: Tensor, variants_points: list[tuple[Variant, list[Point]]], n_queries: int
) -> list[dict]:
    """Records of every layer, variant and point for one text of token ids `[N]`."""
    read = hf.read_context(model, tokens, n_queries=n_queries)
    records = []
    for layer in hf.model_layers(model):
        if not layer.is_full:  # never searched
            continue
        problems: dict[Budget, LayerProblem] = {}
        for variant, points in variants_points:
            stores: dict[Budget, KVStore] = {}
            for point in points:
                layout = layout_of(point.budget)
                if layout not in problems:
                    problems[layout] = LayerProblem(read, layer.info, layout)
                problem = problems[layout]
                point.prepare(variant.method)
                if layout not in stores:
                    stores[layout] = problem.store_for(variant.method, point.budget)
                measured = problem.measure(stores[layout], point.budget)
                place = {"method": variant.label, "budget": point.label}
                records.append({**place, "layer": layer.info.number, **measured})
    return records


def layout_of(budget: Budget) -> Budget:
    """What of a budget lays out rows, as a budget."""
    return dataclasses.replace(
        Budget(max_tokens=0),
        n_sink=budget.n_sink,
        window=budget.window,
        flush_every=budget.flush_every,
    )
