"""What each part of routing brings, on the reference model: the tables of `docs/partitions.md`.

    python -m benchmarks.routing                # trains an index first, as the demo does
    python -m benchmarks.routing --index FILE   # one that `saap train --baselines` wrote

The last queries of held-out texts ask the context before them, in every layer and head, at equal
rows. Raw figures go to `$OUT`, else to `benchmarks/results/<device>/routing.json`, and in the
latter case the tables in `docs/partitions.md` are made from them.
"""

import argparse
import dataclasses
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from saap import hf
from saap.budget import Budget
from saap.eval import reference
from saap.eval.cli.demo import training_sequences
from saap.eval.tasks.attention import LayerProblem, layout_of
from saap.eval.tasks.base import text_tokens
from saap.kv import KVStore
from saap.methods import find_method
from saap.methods.learned import RoutedSelector
from saap.routing import LayerRouting
from saap.trained_index import TrainedIndex
from saap.training import train

from .cpu import cpu_name, environment
from .reports import ROOT, put_table, report_path, write

CONTEXT, N_QUERIES, N_SINK = 8192, 64, 16
# Share of the context, and how much of it the window is. The usual window alone is above 2 %.
SHARES = {0.02: 1 / 128, 0.05: 1 / 32, 0.1: 1 / 32}
MEASURED_HEAD = 0.01  # of attention in the middle, for a head to count as one that looks there
TOP_P = (0.5, 0.8, 0.9, 0.95)
# The ways to bound what `blend` visits, from little to much.
BOUNDS = {
    "nprobe": (16, 32, 64, 128, 256),
    "max_tokens": (64, 136, 300, 543, 1000),
    "top_p": (0.3, 0.5, 0.65, 0.8, 0.9),
    "min_weight": (1e-3, 3e-4, 1e-4, 4e-5, 2e-5),
}
PAGE = ROOT / "docs" / "partitions.md"

# Name, router, segments of a bucket, share of the trained router in the blend, one selection for
# each KV group or query head.
VARIANTS = (
    ("linear, whole buckets", "linear", 1, 0.0, "group"),
    ("trained, whole buckets (`mlp`)", "mlp", 1, 1.0, "group"),
    ("turned centroids, 4 segments", "centroid", 4, 0.0, "group"),
    ("turned centroids, 8", "centroid", 8, 0.0, "group"),
    ("turned centroids, 16 (`kmeans-cells`)", "centroid", 16, 0.0, "group"),
    ("turned centroids, 32", "centroid", 32, 0.0, "group"),
    ("trained, cells of 16, no turned centroids", "mlp", 16, 1.0, "group"),
    ("blend, 4 segments", "mlp", 4, 0.5, "group"),
    ("blend, 8", "mlp", 8, 0.5, "group"),
    ("**blend, 16 (`blend`)**", "mlp", 16, 0.5, "group"),
    ("blend, 32", "mlp", 32, 0.5, "group"),
    ("blend, 16, a quarter trained", "mlp", 16, 0.25, "group"),
    ("blend, 16, three quarters trained", "mlp", 16, 0.75, "group"),
    ("blend, 16, a selection per query head", "mlp", 16, 0.5, "head"),
)


def routing_of(layer, router: str, n_segments: int, share: float) -> LayerRouting:
    return dataclasses.replace(LayerRouting.of(layer, router, n_segments), trained_share=share)


def store_of(problem: LayerProblem, routing: LayerRouting, budget: Budget) -> KVStore:
    """The store of a layer that has read the context, its lists scored by `routing`."""
    store = KVStore(RoutedSelector(routing), budget)
    store.append(*(t[:, :, : problem.n_context] for t in problem.keys))
    return store


def measure(model, index: TrainedIndex, texts: list[torch.Tensor]) -> dict:
    """Results of each text and layer: `{"variants": {(name, share): [...]}, "top_p": ...}`."""
    usual_window = (CONTEXT - N_QUERIES) // 32
    found: dict[str, dict] = {n: defaultdict(list) for n in ("variants", "top_p", "bounds")}
    layers = [layer.info for layer in hf.model_layers(model) if layer.is_full]
    for number, tokens in enumerate(texts):
        read = hf.read_context(model, tokens, n_queries=N_QUERIES)
        for info in layers:
            own = index.layers[info.number]

            def run(problem, store, budget, layer=info.number):
                return {"layer": layer, **problem.measure(store, budget)}

            for share, part in SHARES.items():
                window = round(part * CONTEXT) if part != 1 / 32 else usual_window
                places = {"n_sink": N_SINK, "window": window}
                rows = round(share * (CONTEXT - N_QUERIES)) - N_SINK - window
                budget = Budget(max_tokens=rows, **places)
                problem = LayerProblem(read, info, layout_of(budget))
                for name, router, n_segments, trained, heads in VARIANTS:
                    one = dataclasses.replace(budget, share=heads)
                    store = store_of(problem, routing_of(own, router, n_segments, trained), one)
                    found["variants"][name, share].append(run(problem, store, one))
                for name in ("kmeans", "kmeans-rope", "oracle"):
                    store = problem.store_for(find_method(name)(index), budget)
                    found["variants"][name, share].append(run(problem, store, budget))
            places = {"n_sink": N_SINK, "window": usual_window}
            problem = LayerProblem(read, info, layout_of(Budget(max_tokens=0, **places)))
            for p in TOP_P:
                budget = Budget(top_p=p, **places)
                for name, n_segments, trained in (("mlp", 1, 1.0), ("blend", 16, 0.5)):
                    store = store_of(problem, routing_of(own, "mlp", n_segments, trained), budget)
                    found["top_p"][name, p].append(run(problem, store, budget))
            store = store_of(problem, LayerRouting.of(own, "mlp"), problem.layout)
            for bound, values in BOUNDS.items():
                for value in values:
                    budget = Budget(**{bound: value}, **places)
                    out, _, _, lengths = problem.attend(store, budget)
                    found["bounds"][bound, value].append(
                        {
                            **problem.measure(store, budget),
                            "rows": float(lengths.sum(-1).float().mean()),
                            "errors": problem.output_errors(out).tolist(),
                        }
                    )
        print(f"text {number + 1} of {len(texts)}", flush=True)
    return found


def summary(results: list[dict]) -> dict:
    caught, mass = (
        sum(np.sum(r[key]) for r in results) for key in ("middle_caught", "middle_mass")
    )
    queries = sum(r["queries"] for r in results)
    heads: dict[int, np.ndarray] = {}
    for r in results:
        own = np.array([r["middle_caught"], r["middle_mass"]])
        heads[r.get("layer", 0)] = heads.get(r.get("layer", 0), 0) + own
    return {
        "caught_by_head": [(h[0] / h[1].clip(1e-9)).round(4).tolist() for h in heads.values()],
        "middle_by_head": [
            (h[1] * len(heads) / queries).round(4).tolist() for h in heads.values()
        ],
        "recall_middle": round(float(caught / mass), 4),
        "output_error": round(sum(r["output_error"] for r in results) / queries, 4),
        "selectivity": round(float(np.mean([r["selectivity"] for r in results])), 4),
        "kilobytes": round(float(np.mean([r["bytes_read"] for r in results])) / 1e3, 1),
    }


def tables(report: dict) -> str:
    shares = [f"{s:.0%}" for s in SHARES]
    shares[0] += f" (window {round(SHARES[0.02] * CONTEXT)})"
    best = report["variants"]["oracle"]["0.05"]
    counted = np.array(best["middle_by_head"]) > MEASURED_HEAD
    lines = [
        "Recall of the middle's attention mass, and output error, at equal rows "
        f"({report['texts']} held-out texts of {CONTEXT:,} tokens, all layers and heads). The "
        f"worst head is told as a share of the oracle's recall, of the {counted.sum()} heads with "
        f"more than {MEASURED_HEAD:.0%} of their attention in the middle:",
        "",
        f"| routing | {' | '.join(shares)} | worst head at 5% | error at 5% | kB at 5% |",
        "|---|" + "---|" * (len(SHARES) + 3),
    ]
    for name, by_share in report["variants"].items():
        at = by_share["0.05"]
        recalls = " | ".join(f"{by_share[str(s)]['recall_middle']:.1%}" for s in SHARES)
        of_best = (
            np.array(at["caught_by_head"])[counted] / np.array(best["caught_by_head"])[counted]
        )
        lines.append(
            f"| {name} | {recalls} | {of_best.min():.0%} | {at['output_error']:.3f} "
            f"| {at['kilobytes']:,.0f} |"
        )
    lines += [
        "",
        "What `top_p` asks for and what is found (recall of the middle; share of the cache read):",
        "",
        f"| | {' | '.join(f'top_p={p}' for p in TOP_P)} |",
        "|---|" + "---|" * len(TOP_P),
    ]
    for name, by_p in report["top_p"].items():
        cells = (by_p[str(p)] for p in TOP_P)
        row = " | ".join(f"{c['recall_middle']:.1%} of {c['selectivity']:.1%}" for c in cells)
        lines.append(f"| {name} | {row} |")
    lines += [
        "",
        "Ways to bound what `blend` visits: rows of the middle per query and KV head on average, "
        "recall, and output error in the mean and at the 95th percentile of queries and layers:",
        "",
        "| bound | rows | recall | mean error | 95th percentile |",
        "|---|---|---|---|---|",
    ]
    for bound, by_value in report["bounds"].items():
        for value, r in by_value.items():
            lines.append(
                f"| `{bound}={value}` | {r['rows']:,.0f} | {r['recall_middle']:.1%} "
                f"| {r['output_error']:.4f} | {r['output_error_p95']:.3f} |"
            )
    return "\n".join(lines)


def with_percentile(results: list[dict]) -> dict:
    errors = np.concatenate([r["errors"] for r in results])
    return {
        **summary(results),
        "rows": round(float(np.mean([r["rows"] for r in results])), 1),
        "output_error_p95": round(float(np.quantile(errors, 0.95)), 4),
    }


def nested(found: dict, summary=summary) -> dict:
    out: dict[str, dict] = {}
    for (name, point), results in found.items():
        out.setdefault(name, {})[str(point)] = summary(results)
    return out


def held_out_texts(count: int) -> list[torch.Tensor]:
    """Texts for the reference model that neither it nor its indexes have seen."""
    tokenizer, text = hf.load_tokenizer(reference.FOLDER), reference.split_held_out()[1]
    return [text_tokens(tokenizer, text, CONTEXT, i, count) for i in range(count)]


def training_texts() -> list[torch.Tensor]:
    return training_sequences(reference.split_held_out()[0], CONTEXT, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--index", type=Path)
    parser.add_argument("--texts", type=int, default=6)
    options = parser.parse_args()
    model = hf.load_model(reference.FOLDER)
    if options.index:
        index = TrainedIndex.load(options.index)
    else:
        index = train(model, training_texts(), baselines=True)
    texts = held_out_texts(options.texts)
    found = measure(model, index, texts)
    report = {
        "environment": environment(),
        "texts": len(texts),
        "variants": nested(found["variants"]),
        "top_p": nested(found["top_p"]),
        "bounds": nested(found["bounds"], with_percentile),
    }
    write(report_path(cpu_name(), "routing.json"), report)
    put_table(PAGE, "python -m benchmarks.routing", tables(report))
    print(tables(report))


if __name__ == "__main__":
    main()
