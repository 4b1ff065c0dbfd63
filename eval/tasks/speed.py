"""Time of one decode step of each layer, over the very path whose answers are judged.

`KVStore.step` does what decoding does; here it is called with captured tokens, and its parts are
timed where they are called:

- route: scoring lists, pages or rows (what a router or summary costs);
- select: from scores to ranges of rows, sinks and window put in front;
- attend: exact attention over the ranges;
- other: what is left of the step, the new token's append with it.

Partial results of threads are merged inside attend, which has no separate merge here.

Beside it dense attention as it should be compared with: SDPA with the query heads of a KV group
packed as rows of one query. The two take turns, round by round, so that a machine that is busy
slows both; figures are medians, and ratios are medians of rounds.
"""

import os
import time
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch

from saap import hf
from saap.kv import KVStore
from saap.kv.decode_steps import DecodeSteps
from saap.kv.next_step import NextStep
from saap.kv.steps import StepAttention

from ..decoding import layout
from .base import Task, text_tokens

N_ROUNDS, N_WARM = 15, 2
N_QUERIES = N_ROUNDS + N_WARM
PARTS = ("route", "select", "attend", "other")

PLACES = {
    "attend": ((StepAttention, "attend"), (NextStep, "attend")),
    "ranges": ((DecodeSteps, "select"), (NextStep, "choose")),
}
"""Where parts of a step are done: a general one, and one that is like the one before."""


class Speed(Task):
    name, budgets = "speed", "budgets"
    timed = True

    def n_units(self, config):
        return 1

    def context_rows(self, config, context):
        return context - N_QUERIES

    @torch.no_grad()
    def run_unit(self, bench, context, number):
        # The last tokens of the text ask; what is cached before them is the context.
        tokens = text_tokens(bench.tokenizer, bench.text, context, number, 1)
        n_context = self.context_rows(bench.config, context)
        read = hf.read_context(bench.model, tokens, n_queries=N_QUERIES)
        records = []
        for layer in (own.info for own in hf.model_layers(bench.model) if own.is_full):
            for variant, points in bench.points(n_context, bench.config.budgets):
                for record in time_variant(read, layer, n_context, variant, points):
                    found = {"method": variant.label, "layer": layer.number, **record}
                    records.append(found)
        return records, bytes(tokens.to(torch.int32).numpy())


def time_variant(read, layer, n_context, variant, points) -> list[dict]:
    keys = read.keys(layer.number)
    built = {}
    records = []
    for point in points:
        point.prepare(variant.method)
        if layout(point) not in built:
            start = time.perf_counter()
            rows = read.new_rows(layer.number)
            store = KVStore(variant.method.selector(layer), point.budget, rows=rows)
            store.append(*(t[:, :, :n_context] for t in keys))
            seen = read.latest[layer.number][:, :, :-N_QUERIES]
            store.selector.observe(seen, [seen.shape[2]])
            store.settle()
            built[layout(point)] = store, 1e3 * (time.perf_counter() - start)
        store, build_ms = built[layout(point)]
        store.truncate(store.length - n_context)
        store.budget = point.budget
        timed = time_point(read, layer, store, keys)
        records.append({"budget": point.label, "build_ms": build_ms, **timed})
    return records


def time_point(read, layer, store, keys) -> dict:
    q_rope, q_derope = read.queries[layer.number]
    spent = {f"{part}_us": [] for part in (*PARTS, "step", "dense")}
    share, options = 0.0, {"sm_scale": layer.sm_scale, "softcap": layer.softcap}
    for number in range(len(q_rope)):
        n = store.length + 1
        new = [t[:, :, n - 1 : n] for t in keys]
        queries = q_rope[number, None, :, None], q_derope[number, None, :, None]
        start = time.perf_counter()
        packed_dense(queries[0][:, :, 0], *(t[:, :, :n] for t in keys[:2]), layer.sm_scale)
        dense = time.perf_counter() - start
        with stopwatch(store.selector) as parts:
            start = time.perf_counter()
            store.step(*new, *queries, **options)
            parts["step"] = time.perf_counter() - start
        if number < N_WARM:
            continue
        parts["select"] = parts["ranges"] - parts["route"]
        parts["other"] = parts["step"] - parts["ranges"] - parts["attend"]
        parts["dense"] = dense
        for name, values in spent.items():
            values.append(round(1e6 * parts[name.removesuffix("_us")], 2))
        share += store.visited_share / N_ROUNDS
    return {
        "selectivity": share,
        "bytes_read": store.bytes_read,
        "router_bytes": store.selector.nbytes,
        "load": round(os.getloadavg()[0], 2),
        "threads": torch.get_num_threads(),
        **spent,
    }


def packed_dense(q, k, v, sm_scale):
    packed = q.unflatten(1, (k.shape[1], -1))
    return torch.nn.functional.scaled_dot_product_attention(packed, k, v, scale=sm_scale)


@contextmanager
def stopwatch(selector):
    """Seconds in the parts of a step: `route`, `ranges` (route included), `attend`."""
    parts = dict.fromkeys(("route", "ranges", "attend"), 0.0)

    def timed(name, function):
        def call(*arguments, **options):
            start = time.perf_counter()
            found = function(*arguments, **options)
            parts[name] += time.perf_counter() - start
            return found

        return call

    with ExitStack() as opened:
        for part, functions in PLACES.items():
            for owner, name in functions:
                watched = timed(part, getattr(owner, name))
                opened.enter_context(mock.patch.object(owner, name, watched))
        if hasattr(selector, "scores"):
            selector.scores = timed("route", selector.scores)
        try:
            yield parts
        finally:
            selector.__dict__.pop("scores", None)
