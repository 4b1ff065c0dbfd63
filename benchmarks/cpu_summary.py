"""Table and summary of `benchmarks.cpu`, from its raw records alone."""

import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from .cpu_timing import paired_ratio

Record = dict[str, Any]

PACKED, GQA = "sdpa packed", "sdpa gqa"


def groups(records: Iterable[Record]) -> Iterator[dict[str, Record]]:
    """Records that took turns with each other, by `impl`."""
    together: dict[tuple, dict[str, Record]] = {}
    for record in records:
        key = (record["section"], record["storage"], record.get("rows"))
        together.setdefault(key, {})[record["impl"]] = record
    yield from together.values()


def of_read(record: Record, group: dict[str, Record]) -> float:
    """Share of the read bandwidth of the same rounds that the bytes of K and V are taken with."""
    reads = [other for name, other in group.items() if name.startswith("read")]
    fastest = [min(ms) for ms in zip(*(read["ms"] for read in reads), strict=True)]
    return paired_ratio(fastest, record["ms"]) * record["bytes"] / reads[0]["bytes"]


def table(records: list[Record]) -> str:
    """One line for each thing timed. Ratios are the peer's time over this one's."""
    lines = []
    for group in groups(records):
        first = next(iter(group.values()))
        if first["section"] == "dense":
            lines.append(f"\n{first['rows']:,} rows, {first['storage']}")
            baselines = [name for name in (PACKED, GQA) if name in group]
        else:
            lengths = first["lengths"]
            lines.append(
                f"\nbatch of {len(lengths)}, {first['storage']}: {sum(lengths):,} tokens, ragged "
                f"{min(lengths):,} to {max(lengths):,} or of equal length"
            )
            baselines = ["saap uniform"]
        heads = "".join(f"{'vs ' + name:>16}" for name in baselines)
        lines.append(f"{'':30}{'ms':>9}{'± %':>6}{'GB/s':>8}{'of read':>9}{heads}")
        for name, record in group.items():
            ms = statistics.median(record["ms"])
            low, _, high = statistics.quantiles(record["ms"], n=4)
            ratios = "".join(
                f"{paired_ratio(group[b]['ms'], record['ms']):15.2f}x" for b in baselines
            )
            lines.append(
                f"{name:30}{ms:9.2f}{50 * (high - low) / ms:6.0f}{record['bytes'] / ms / 1e6:8.1f}"
                f"{of_read(record, group):9.0%}{ratios}"
            )
    return "\n".join(lines)


def summarise(records: list[Record]) -> dict[str, Any]:
    """Every ratio of ours to its peers and to the read, under a name of its own."""
    summary: dict[str, Any] = {}
    for group in groups(records):
        first = next(iter(group.values()))
        if first["section"] == "ragged":
            even, uneven = group["saap uniform"], group["saap ragged"]
            name = f"ragged_{first['storage']}"
            summary[f"{name}_of_uniform"] = _round(paired_ratio(even["ms"], uneven["ms"]))
            summary[f"{name}_of_read"] = _round(of_read(uneven, group))
            continue
        for impl, record in group.items():
            if not impl.startswith("saap "):
                continue
            what = impl.removeprefix("saap ").replace("%", "pct")
            name = f"{what}_{first['rows']}_{first['storage']}"
            for peer, label in ((PACKED, "packed"), (GQA, "gqa")):
                if peer in group and (what == "dense" or peer == PACKED):
                    ratio = paired_ratio(group[peer]["ms"], record["ms"])
                    summary[f"{name}_vs_{label}"] = _round(ratio)
            summary[f"{name}_of_read"] = _round(of_read(record, group))
    return summary


def _round(value: float) -> float:
    return float(f"{value:.3g}")
