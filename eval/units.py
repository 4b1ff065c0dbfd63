"""What each unit (a text, a prompt) gives to a metric: the level at which noise is judged."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

Place = tuple[str, int, str, str]  # task, context, method, budget


@dataclass(frozen=True)
class Metric:
    """A ratio of sums over records. `better` is +1 where more is better, -1 where less is.

    `noisy` ones depend on what else the machine does, not on texts alone.
    """

    name: str
    title: str
    form: str
    better: int
    noisy: bool = False


METRICS = {
    m.name: m
    for m in (
        Metric("recall_middle", "recall, middle", "{:.1%}", 1),
        Metric("needles_lost", "needles lost", "{:.3%}", -1),
        Metric("output_error", "output error", "{:.4f}", -1),
        Metric("accuracy", "accuracy", "{:.1%}", 1),
        Metric("nll", "nats per token", "{:.4f}", -1),
        Metric("divergence", "nats from dense", "{:.4f}", -1),
        Metric("accepted_per_verification", "tokens per verification", "{:.2f}", 1),
        Metric("selectivity", "visited", "{:.1%}", -1),
        Metric("bytes_read", "bytes per layer and step", "{:,.0f}", -1),
        Metric("step_us", "µs per layer and step", "{:,.0f}", -1, noisy=True),
        Metric("build_ms", "build ms a layer", "{:,.1f}", -1, noisy=True),
    )
}


def contribution(metric: str, record: dict) -> tuple[float, float] | None:
    """(top, bottom) of one record; None where the record has no such metric."""
    if metric == "recall_middle" and "middle_caught" in record:
        return sum(record["middle_caught"]), sum(record["middle_mass"])
    if metric == "needles_lost" and "needle_lost" in record:
        mass = sum(record["needle_mass"])
        return (sum(record["needle_lost"]), mass) if mass else None
    if metric == "output_error" and "output_error" in record:
        return record["output_error"], record["queries"]
    if metric in ("nll", "divergence") and metric in record:
        return record[metric], record["tokens"]
    if metric == "accepted_per_verification" and "verifications" in record:
        return record["accepted"] + record["verifications"], record["verifications"]
    if metric in ("accuracy", "selectivity", "bytes_read", "build_ms") and metric in record:
        return record[metric], 1.0
    if metric == "step_us" and "step_us" in record:
        return float(np.median(record["step_us"])), 1.0
    return None


def place_of(record: dict) -> Place:
    return record["task"], record["context"], record["method"], record["budget"]


def by_unit(records: list[dict]) -> dict[tuple[Place, str], dict[str, np.ndarray]]:
    """For each (place, metric): the unit's summed (top, bottom), by unit name."""
    found: dict[tuple[Place, str], dict[str, np.ndarray]] = defaultdict(dict)
    for record in records:
        if "method" not in record:
            continue
        for metric in METRICS:
            parts = contribution(metric, record)
            if parts is not None:
                units = found[place_of(record), metric]
                units[record["unit"]] = units.get(record["unit"], 0) + np.array(parts)
    return found


def paired(
    a: dict[str, np.ndarray], b: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray] | None:
    """The units that both have, in one order; None where there are none."""
    shared = [unit for unit in a if unit in b]
    if not shared:
        return None
    return np.array([a[u] for u in shared]), np.array([b[u] for u in shared])


def share_of(budget: str) -> float | None:
    """The share of the context in a budget's label; None for a bound of another kind."""
    try:
        share = float(budget.split()[0])
    except ValueError:
        return None
    return share if 0 < share <= 1 else None


def told_lost(share: float) -> str:
    """A share that may be very small: `0.012%`, `1.3%`."""
    percent = 100 * share
    return f"{percent:.2g}%" if percent < 1 else f"{percent:.1f}%"


def told_search(budget: str) -> str:
    """What of a budget's label is no share: `0.05 ef=32` -> `ef=32`."""
    if share_of(budget) is None:
        return budget.removeprefix("–")
    return " ".join(budget.split()[1:])
