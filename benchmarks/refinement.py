"""Centroids refined on the context against trained ones as they are and trained from scratch.

    python -m benchmarks.refinement INDEX    # one of SmolLM2: see `benchmarks.selectors`

A partition trained offline serves any context; a few Lloyd steps at prefill fit it to this one,
and bucket numbers keep their meaning, so that the trained router still applies. From scratch they
have none, and no router. Buckets are whole here, not cut into cells. Figures go to `$OUT`, else to
`benchmarks/results/<device>/refinement.json`, and then into `docs/partitions.md`.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable

from torch import Tensor

from saap import hf
from saap.budget import Budget
from saap.eval.corpora import read_named
from saap.eval.tasks.attention import LayerProblem, layout_of
from saap.eval.tasks.base import text_tokens
from saap.index import kmeans
from saap.methods import METHODS
from saap.trained_index import TrainedIndex

from . import reports
from .cpu import cpu_name, environment
from .reports import markdown

PAGE, COMMAND = reports.ROOT / "docs" / "partitions.md", "python -m benchmarks.refinement"
CONTEXT, SHARE, N_QUERIES, N_TEXTS = 4096, 0.05, 32, 2
SCRATCH = "from scratch"
STEPS = (1, 3, 10)
ROUTED_BY = ("oracle", "kmeans", "mlp")


def with_centroids(index: TrainedIndex, layer: int, centroids: Tensor) -> TrainedIndex:
    """`index` with other centroids in one layer, and no cells there."""
    layers = list(index.layers)
    layers[layer] = dataclasses.replace(layers[layer], centroids=centroids, n_segments=1)
    return TrainedIndex(tuple(layers), index.metadata)


def partitions(problem: LayerProblem, budget: Budget, index: TrainedIndex) -> list[dict]:
    """Middle mass, found and in all, for every partition of a layer and way to route over it.

    `partition_s`, `partition_cpu_s`: what making the partition took, on the clock and on the
    cores.
    """
    layer = problem.info.number
    keys = problem.k_derope[0, :, problem.first : problem.stop]
    own = index.layers[layer].centroids
    ways: dict[str, Callable[[], Tensor]] = {"as trained": lambda: own}
    for n in STEPS:
        name = f"refined, {n} step{'s' * (n > 1)}"
        ways[name] = lambda n=n: kmeans.refine_centroids(keys, own, n_iter=n)
    ways[SCRATCH] = lambda: kmeans.train_centroids(keys, own.shape[1], n_iter=10)
    found = []
    for partition, make in ways.items():
        wall, cpu = time.perf_counter(), time.process_time()
        centroids = make()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        there = with_centroids(index, layer, centroids)
        for name in ROUTED_BY:
            if partition == SCRATCH and name == "mlp":
                continue
            sums = problem.measure(problem.store_for(METHODS[name](there), budget), budget)
            found.append(
                {
                    "partition": partition, "method": name, "layer": layer,
                    "middle_mass": round(sum(sums["middle_mass"]), 5),
                    "middle_caught": round(sum(sums["middle_caught"]), 5),
                    "partition_s": round(wall, 4), "partition_cpu_s": round(cpu, 4),
                }
            )  # fmt: skip
    return found


def table(records: list[dict]) -> str:
    """Recall of each way to route, and time for a layer, by partition."""
    rows = []
    for partition in dict.fromkeys(r["partition"] for r in records):
        own = [r for r in records if r["partition"] == partition]
        spent = [sum(r[f"partition_{kind}"] for r in own) / len(own) for kind in ("s", "cpu_s")]
        row = [partition, *(f"{s:.2f}" for s in spent)]
        for name in ROUTED_BY:
            routed = [r for r in own if r["method"] == name]
            caught, mass = (sum(r[f"middle_{k}"] for r in routed) for k in ("caught", "mass"))
            row.append(f"{caught / mass:.1%}" if routed else "–")
        rows.append(row)
    head = ["centroids", "s per layer", "core s", *(f"`{name}`" for name in ROUTED_BY)]
    return markdown(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("index", help="file that `saap train smollm2 --baselines` wrote")
    parser.add_argument("--text", type=int, default=0, help="which text is read")
    options = parser.parse_args()
    model, tokenizer = hf.load_model("smollm2"), hf.load_tokenizer("smollm2")
    index = TrainedIndex.load(options.index)
    text = b"\n".join(read_named("prose2"))
    tokens = text_tokens(tokenizer, text, CONTEXT, options.text, N_TEXTS)
    read = hf.read_context(model, tokens, n_queries=N_QUERIES)
    budget = Budget.for_selectivity(SHARE, CONTEXT - N_QUERIES, estimate_rest=False)
    records = []
    for place in hf.model_layers(model):
        problem = LayerProblem(read, place.info, layout_of(budget))
        records += partitions(problem, budget, index)
        print(f"layer {place.info.number}: done", flush=True)
    path = reports.report_path(cpu_name(), "refinement.json")
    reports.write(path, {"environment": environment(), "records": records})
    reports.put_table(PAGE, COMMAND, table(records))
    print(f"{table(records)}\n\nwrote {path} and {PAGE}")


if __name__ == "__main__":
    main()
