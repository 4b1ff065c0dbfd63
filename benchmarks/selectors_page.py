"""`docs/selectors.md`, and its tables, from the raw records of `benchmarks.selectors` alone.

python -m benchmarks.selectors_page benchmarks/results/<device>/selectors.json
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]

UNCHARGED = ("dense", "oracle", "oracle-tokens")
"""What these read to choose is not counted: nothing, or the truth itself."""


def summary(records: Iterable[Record]) -> Record:
    """Means and shares over texts and layers, for one method at one budget.

    Mass is summed before it is divided, so that heads which never look far weigh little.
    """
    records = list(records)
    n = len(records)
    mass = sum(r["middle_mass"] for r in records)
    return {
        "recall@100": sum(r["recall@100"] for r in records) / n,
        "mass": sum(r["middle_caught"] for r in records) / mass,
        "bytes": sum(r["bytes"] for r in records) / n,
        "bytes_choosing": sum(r["bytes_choosing"] for r in records) / n,
        "build_cpu_s": sum(r["build_cpu_s"] for r in records) / n,
    }


def by_method(report: Record) -> dict[str, dict[float, Record]]:
    """`[method][share]`, the method that catches most at the smallest share first."""
    together: dict[str, dict[float, list[Record]]] = {}
    for record in report["records"]:
        together.setdefault(record["method"], {}).setdefault(record["share"], []).append(record)
    found = {
        name: {share: summary(own) for share, own in shares.items()}
        for name, shares in together.items()
    }
    least = min(report["about"]["shares"])
    return dict(sorted(found.items(), key=lambda item: -item[1][least]["mass"]))


def markdown(head: list[str], rows: list[list[str]], n_texts: int = 1) -> str:
    """`n_texts`: so many columns, from the first one on, hold words; the others numbers."""
    lines = [head, ["---"] * n_texts + ["---:"] * (len(head) - n_texts), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(report: Record) -> str:
    shares = report["about"]["shares"]
    head = ["selector", "choosing, KB"]
    for share in shares:
        head += [f"recall@100 at {share:.0%}", "mass", "KB"]
    rows = []
    for name, found in by_method(report).items():
        choosing = found[min(shares)]["bytes_choosing"]
        row = [f"`{name}`", "–" if name in UNCHARGED else f"{choosing / 1e3:,.0f}"]
        for share in shares:
            own = found[share]
            row += [f"{own['recall@100']:.1%}", f"{own['mass']:.1%}", f"{own['bytes'] / 1e3:,.0f}"]
        rows.append(row)
    return markdown(head, rows)


def refinement_table(report: Record) -> str:
    """Mass at the smallest share, time per layer; methods and partitions in order of records."""
    least = min(report["about"]["shares"])
    records = [r for r in report["refinement"] if r["share"] == least]
    methods = list(dict.fromkeys(r["method"] for r in records))
    head = ["centroids", "s per layer", "core s"]
    for name in methods:
        head += [f"`{name}`: mass", "recall@100"]
    rows = []
    for partition in dict.fromkeys(r["partition"] for r in records):
        own = [r for r in records if r["partition"] == partition]
        spent = [sum(r[f"partition_{kind}"] for r in own) / len(own) for kind in ("s", "cpu_s")]
        row = [partition, *(f"{s:.2f}" for s in spent)]
        for name in methods:
            routed = [r for r in own if r["method"] == name]
            found = summary(routed) if routed else None
            row += ["", ""] if found is None else [
                f"{found['mass']:.1%}", f"{found['recall@100']:.1%}"
            ]  # fmt: skip
        rows.append(row)
    return markdown(head, rows)


PAGE = """# Selectors compared

After this page you can compare all methods at equal budgets on one model.

Made by `python -m benchmarks.selectors` from `{folder}/selectors.json`; do not edit it.
What each selector is and reads: [methods](methods.md).

Measured on the reference model, the small one that is shipped ({layers} layers, {heads} query
and {kv} KV heads of {dim}), with {texts} held-out texts of {tokens:,} tokens. The last {queries}
queries of each text search the {context:,} tokens before them, in all layers and heads; the query
heads of a KV head share a selection. The first {n_sink} tokens (*sinks*) and the most recent
{window} (*window*) are always visited. They count in the budget: the share of the context in the
heading of a column.
The index of {nlist} buckets, {cells:,} cells, was trained on {trained:,} other tokens.

- **recall@100**: of each query head's 100 highest-scored keys between sinks and window, the share
  that was visited; the mean over heads, although most heads hardly look there.
- **mass**: the share of the attention between sinks and window that was visited; summed over
  queries, heads and layers before dividing, so that the heads that look far count most.
- **KB**: what one step of one layer reads: keys and values of the visited rows, and what choosing
  reads, in float32. **choosing** is the second part alone; for oracles it is not counted.

{table}

What choosing reads grows with the context for methods that look at every key, code, page or
cluster of it (`flat`, `saap`, `pq`, `lsh`, `quest` and the other pages, `kmeans-online`). It stays
the same for methods over trained buckets. At full budget every method is dense attention
(`tests/test_methods.py`).

## Refined on the context

Trained centroids can be moved to fit a context, by a few Lloyd steps (k-means iterations) on its
keys without RoPE. The table compares this with the trained centroids as they are, and with k-means
of these keys from scratch, at {least:.0%} of the context, over whole buckets. `oracle` is the most
that any router could find with that partition. `kmeans` visits the nearest centroids. `mlp` is the
trained router, which still applies because buckets keep their numbers.

{refinement}

Times are for the {kv} KV heads of one layer on {cores} cores, on a machine that had other work
(load {load_before:.0f} before, {load_after:.0f} after); that disturbs core seconds less than
seconds.
"""


def page(report: Record, folder: str) -> str:
    """The Markdown page; `folder` is where the records lie, from the root of the project."""
    what, model, env = report["about"], report["about"]["model"], report["environment"]
    index = what["index"]
    return PAGE.format(
        folder=folder,
        layers=model["num_layers"],
        heads=model["num_heads"],
        kv=model["num_kv_heads"],
        dim=model["head_dim"],
        texts=what["texts"],
        tokens=what["tokens"],
        queries=what["queries"],
        context=what["tokens"] - what["queries"],
        n_sink=what["n_sink"],
        window=what["window"],
        nlist=index["nlist"],
        cells=index["nlist"] * index["n_segments"],
        trained=index["corpus"]["tokens"],
        table=table(report),
        least=min(what["shares"]),
        refinement=refinement_table(report),
        cores=env["cores"],
        load_before=env["load_before"],
        load_after=env["load_after"],
    )


if __name__ == "__main__":
    source = Path(sys.argv[1])
    root = Path(__file__).resolve().parents[1]
    folder = source.resolve().parent.relative_to(root).as_posix()
    (root / "docs" / "selectors.md").write_text(page(json.loads(source.read_text()), folder))
