"""Partitions and routers on a pretrained model: by rows and by buckets, on prose and on code.

    make models
    saap train smollm2 --corpus prose --context 4096 --texts 8 --window 32 --baselines \\
        --out runs/order.safetensors
    run() { saap eval smollm2 --index runs/order.safetensors --contexts 4096 --tasks attention \\
        --texts 3 "$@"; }
    rows="--methods kmeans-rope,kmeans,linear,mlp,kmeans-cells,blend,saap,oracle-tokens"
    rows="$rows --budgets 0.05,0.1"
    buckets="--methods kmeans-rope,kmeans,linear,mlp"
    for m in kmeans-rope kmeans linear mlp; do
        buckets="$buckets --search $m.nprobe=8"
    done
    for corpus in prose2 code; do
        run --corpus $corpus $rows --out runs/$corpus-rows
        run --corpus $corpus $buckets --out runs/$corpus-buckets
    done
    python -m benchmarks.order runs

Scores go to `benchmarks/results/<device>/order.json`, and then into `docs/partitions.md`.
"""

import sys
from pathlib import Path

from saap.eval.records import read_run
from saap.eval.scores import score_run

from . import reports
from .cpu import cpu_name
from .reports import cell, markdown

PAGE, COMMAND = reports.ROOT / "docs" / "partitions.md", "python -m benchmarks.order"
JUDGED = {"prose2": "Python's manual", "code": "Python code"}
METHODS = (
    "kmeans-rope", "kmeans", "linear", "mlp", "kmeans-cells", "blend", "saap", "oracle-tokens",
)  # fmt: skip
KEPT = ("method", "budget", "selectivity", "recall_middle", "output_error", "queries")
SHARES = ("0.05", "0.1")


def measured(folder: Path) -> dict:
    run, _ = read_run(folder)
    scores = [
        {name: s[name] for name in KEPT} for s in score_run(folder) if s["method"] in METHODS
    ]
    return {"version": run["version"], "environment": run["environment"], "scores": scores}


def table(found: dict[str, dict]) -> str:
    """`found`: of each corpus what was measured by rows and by buckets."""
    head, rows = ["method"], {method: [f"`{method}`"] for method in METHODS}
    for title in JUDGED.values():
        head += [f"{title}: {float(share):.0%} of the rows" for share in SHARES]
        head += ["8 buckets", "rows of these"]
    for corpus in JUDGED:
        by_rows, by_buckets = (
            {(s["method"], s["budget"]): s for s in found[corpus][way]["scores"]}
            for way in ("rows", "buckets")
        )
        for method, cells in rows.items():
            own = by_buckets.get((method, "nprobe=8"), {})
            shares = [by_rows.get((method, s), {}).get("recall_middle") for s in SHARES]
            shares += [own.get("recall_middle"), own.get("selectivity")]
            cells += [cell(share, "{:.1%}") for share in shares]
    return markdown(head, list(rows.values()))


def main(arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise SystemExit(__doc__)
    found = {
        corpus: {
            way: measured(Path(arguments[0]) / f"{corpus}-{way}") for way in ("rows", "buckets")
        }
        for corpus in JUDGED
    }
    path = reports.report_path(cpu_name(), "order.json")
    reports.write(path, found)
    reports.put_table(PAGE, COMMAND, table(found))
    print(table(found))


if __name__ == "__main__":
    main(sys.argv[1:])
