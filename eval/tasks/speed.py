"""Time of one decode step of each layer, over the very path whose answers are judged.

`saap.decode.LayerDecoder.attend` is what the tasks that ask decode with; here it is called with
captured queries and its parts are timed where it calls them:

- route: scoring lists, pages or rows (what a router or summary costs);
- select: from scores to ranges of rows, sinks and window put in front;
- attend: exact attention over the ranges;
- other: what is left of the step.

Partial results of threads are merged inside attend, which has no separate merge here.

Beside it dense attention as it should be compared with: SDPA with the query heads of a KV group
packed as rows of one query. The two take turns, round by round, so that a machine that is busy
slows both; figures are medians, and ratios are medians of rounds.
"""

import os
import time
from contextlib import contextmanager
from unittest import mock

import torch

from saap import decode as decode_module
from saap.decode import LayerDecoder

from .attention import capture
from .base import Task, text_tokens

N_ROUNDS, N_WARM = 15, 2
PARTS = ("route", "select", "attend", "other")


class Speed(Task):
    name = "speed"
    timed = True

    def n_units(self, config):
        return 1

    @torch.no_grad()
    def run_unit(self, bench, context, number):
        n_queries = N_ROUNDS + N_WARM
        # The last tokens of the text ask; what is cached before them is the context.
        tokens = text_tokens(bench.tokenizer, bench.text, context, number, 1)
        n_context = context - n_queries
        taken = capture(bench.model, tokens, n_queries)
        records = []
        for layer in sorted(taken.caches):
            cache = [t[:, :, :n_context].contiguous() for t in taken.caches[layer].views()]
            for arm, points in bench.points(n_context, bench.config.budgets):
                for record in time_arm(taken, layer, cache, arm, points):
                    records.append({"method": arm.label, "layer": layer, **record})
        return records, bytes(tokens.to(torch.int32).numpy())


def time_arm(taken, layer, cache, arm, points) -> list[dict]:
    call = taken.calls[layer]
    built = {}
    records = []
    for point in points:
        layout = point.budget.n_sink, point.budget.window
        if layout not in built:
            start = time.perf_counter()
            decoder = LayerDecoder.from_cache(
                layer, *cache, arm.method, point.budget, n_heads=call.q_rope.shape[1],
                sm_scale=call.sm_scale, softcap=call.softcap, spare=1,
            )  # fmt: skip
            built[layout] = decoder, 1e3 * (time.perf_counter() - start)
            k, v = (t[:, :, -1:] for t in cache[:2])
            decoder.store.append(k, v)
        decoder, build_ms = built[layout]
        decoder.budget = point.budget
        point.prepare(decoder.selector)
        records.append(
            {
                "budget": point.label,
                "build_ms": build_ms,
                **time_point(taken, layer, decoder, cache),
            }
        )
    return records


def time_point(taken, layer, decoder, cache) -> dict:
    call = taken.calls[layer]
    q_rope, q_derope = taken.queries(layer)
    spent = {f"{part}_us": [] for part in (*PARTS, "step", "dense")}
    share = 0.0
    for number in range(len(q_rope)):
        queries = q_rope[number, None], q_derope[number, None]
        start = time.perf_counter()
        packed_dense(queries[0], *cache[:2], call.sm_scale)
        dense = time.perf_counter() - start
        with stopwatch(decoder.selector) as parts:
            start = time.perf_counter()
            rows = decoder.attend(*queries, sm_scale=call.sm_scale, softcap=call.softcap)[2]
            parts["step"] = time.perf_counter() - start
        if number < N_WARM:
            continue
        parts["select"] = parts["ranges"] - parts["route"]
        parts["other"] = parts["step"] - parts["ranges"] - parts["attend"]
        parts["dense"] = dense
        for name, values in spent.items():
            values.append(round(1e6 * parts[name.removesuffix("_us")], 2))
        share += float(rows.float().mean()) / decoder.store.length / N_ROUNDS
    row_bytes = 2 * cache[0].shape[-1] * cache[0].element_size()
    return {
        "selectivity": share,
        "bytes_read": float(rows.sum()) * row_bytes + decoder.selector.nbytes,
        "router_bytes": decoder.selector.nbytes,
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

    attend, ranges = decode_module.attend_ranges, LayerDecoder.ranges
    with (
        mock.patch.object(decode_module, "attend_ranges", timed("attend", attend)),
        mock.patch.object(LayerDecoder, "ranges", timed("ranges", ranges)),
    ):
        if hasattr(selector, "scores"):
            selector.scores = timed("route", selector.scores)
        try:
            yield parts
        finally:
            selector.__dict__.pop("scores", None)
