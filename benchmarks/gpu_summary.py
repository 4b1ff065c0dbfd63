"""The few figures that the records of `benchmarks.gpu` are read for."""

from collections.abc import Iterable
from typing import Any

from .gpu_peers import SDPA

Record = dict[str, Any]


def summarise(records: list[Record], copy_gbps: float) -> dict[str, Any]:
    """Ratios are the peer's time over saap's; a figure that was not measured is None."""
    timed = [r for r in records if "ms" in r]
    dense = {
        context: [r for r in select(timed, section="dense", batch=1) if r["context"] == context]
        for context in ("128k", "171k")
    }
    summary = {
        "copy_gbps": round(copy_gbps, 1),
        "dense_128k_b1_of_copy": of_copy(dense["128k"]),
        "dense_128k_b1_vs_best_peer": ratio(dense["128k"]),
    }
    for batch in (8, 32):
        ragged = select(timed, section="ragged", batch=batch)
        padded = [r for r in ragged if r["impl"] == "saap" or r["impl"] in SDPA]
        summary |= {
            f"ragged_b{batch}_of_copy": of_copy(ragged),
            f"ragged_b{batch}_vs_best_padded_peer": ratio(padded),
            f"ragged_b{batch}_vs_best_peer": ratio(ragged),
        }
    for r in select(timed, section="selection", context="171k"):
        name = f"selection_171k_{100 * r['share']:g}pct"
        peer = fastest(peers_of(dense["171k"]))
        summary[f"{name}_us"] = round(1e3 * r["ms"], 1)
        summary[f"{name}_vs_best_dense_peer"] = peer and round(peer / r["ms"], 2)
    for r in select(timed, section="choice"):
        summary[f"choice_{r['context']}_b{r['batch']}_us"] = round(1e3 * r["ms"], 1)
    summary["not_measured"] = sum("ms" not in r and "us" not in r for r in records)
    return summary


def select(records: Iterable[Record], **wanted: Any) -> list[Record]:
    return [r for r in records if all(r.get(name) == value for name, value in wanted.items())]


def peers_of(records: Iterable[Record]) -> list[Record]:
    return [r for r in records if not r["impl"].startswith("saap")]


def fastest(records: Iterable[Record]) -> float | None:
    return min((r["ms"] for r in records), default=None)


def ratio(records: list[Record]) -> float | None:
    peer, ours = fastest(peers_of(records)), fastest(select(records, impl="saap"))
    return round(peer / ours, 2) if peer and ours else None


def of_copy(records: list[Record]) -> float | None:
    return max((round(r["of_copy"], 3) for r in select(records, impl="saap")), default=None)
