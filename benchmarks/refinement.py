"""Centroids refined on the context against trained ones as they are and trained from scratch.

A partition trained offline serves any context; a few Lloyd steps at prefill fit it to this one,
and bucket numbers keep their meaning, so that the trained router still applies. From scratch they
have none, and no router. Buckets are whole here, not cut into cells.
"""

import dataclasses
import time
from collections.abc import Callable

from torch import Tensor

from saap.index import kmeans
from saap.methods import METHODS
from saap.trained_index import TrainedIndex

SCRATCH = "from scratch"
STEPS = (1, 3, 10)
ROUTED_BY = ("oracle", "kmeans", "mlp")


def with_centroids(index: TrainedIndex, layer: int, centroids: Tensor) -> TrainedIndex:
    """`index` with other centroids in one layer, and no cells there."""
    layers = list(index.layers)
    layers[layer] = dataclasses.replace(layers[layer], centroids=centroids, n_segments=1)
    return TrainedIndex(tuple(layers), index.metadata)


def partitions(question, index: TrainedIndex) -> list[dict]:
    """Records of `question.records` for every partition and way to route over it.

    `partition_s`, `partition_cpu_s`: what making the partition of this layer took, on the clock
    and on the cores.
    """
    problem = question.problem
    keys = problem.k_derope[0, :, problem.first : problem.stop]
    own = index.layers[question.layer].centroids
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
        there = with_centroids(index, question.layer, centroids)
        for name in ROUTED_BY:
            if partition == SCRATCH and name == "mlp":
                continue
            for record in question.records(METHODS[name](there)):
                record |= {"partition_s": round(wall, 4), "partition_cpu_s": round(cpu, 4)}
                found.append({"partition": partition, "method": name, **record})
    return found
