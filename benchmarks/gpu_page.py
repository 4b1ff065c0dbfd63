"""The tables of docs/gpu.md, from records of `benchmarks.gpu` and `benchmarks.gpu_decode` alone.

python -m benchmarks.gpu_page benchmarks/results/<device>
"""

import json
import sys
from pathlib import Path
from typing import Any

from .gpu_summary import peers_of, select
from .reports import ROOT, put_table

COMMAND = "python -m benchmarks.gpu_page"


WAYS = {
    "packed": "packed flash", "transformers-flash": "transformers, flash",
    "transformers": "transformers as it comes", "saap-dense": "our store, all rows",
    "saap": "saap",
}  # fmt: skip
PEERS = ("packed", "transformers-flash", "transformers")


def attention_rows(records: list[dict[str, Any]]) -> list[str]:
    rows = []
    for context in ("128k", "171k"):
        of = [r for r in select(records, section="dense", batch=1) if r["context"] == context]
        rows.append(row(f"all of {context}, batch 1", select(of, impl="saap"), peers_of(of)))
    for batch in (8, 32):
        of = select(records, section="ragged", batch=batch)
        what = f"ragged batch of {batch}, 1k to 128k"
        own = select(of, impl="saap")
        padded = [r for r in peers_of(of) if not r["impl"].endswith("-each")]
        rows.append(row(f"{what}, against padded", own, padded))
        each = [r for r in peers_of(of) if r["impl"].endswith("-each")]
        rows.append(row(f"{what}, against one call for each", own, each))
    dense = peers_of(select(records, section="dense", batch=1, context="171k"))
    for share in (0.044, 0.05):
        own = select(records, section="selection", context="171k", share=share)
        rows.append(row(f"{share:.1%} of 171k, in buckets, already chosen", own, dense))
    return rows


def row(what: str, own: list[dict], peers: list[dict]) -> str:
    mine = own[0]
    best = min((r for r in peers if "ms" in r), key=lambda r: r["ms"])
    ratio = best["ms"] / mine["ms"]
    return f"| {what} | {mine['ms']:.3f} | {best['ms']:.3f} ({best['impl']}) | {ratio:.2f} |"


def step_rows(records: list[dict[str, Any]]) -> list[str]:
    rows = []
    chosen = {(r["batch"], r["context"]): r["ms"] for r in select(records, section="choice")}
    steps = select(records, section="step")
    for r in sorted(steps, key=lambda r: (r["rows"], r["batch"], r["share"] is None)):
        choice = chosen.get((r["batch"], r["context"]))
        share = "all" if r["share"] is None else f"{r['visited_share']:.1%}"
        alone = "–" if choice is None or r["share"] is None else f"{choice:.3f}"
        rows.append(
            f"| {r['context']}, batch {r['batch']} | {share} | {alone} | "
            f"{r['kernel_us'] / 1e3:.2f} | {r['us'] / 1e3:.2f} |"
        )
    return rows


def decode_rows(report: dict[str, Any]) -> list[str]:
    rows = []
    for r in report["records"]:
        times = " | ".join(f"{r['ms'][way]:.1f}" for way in WAYS)
        rows.append(f"| {case(r)} | {r['visited_share']['saap']:.1%} | {times} |")
    return rows


def ratio_rows(report: dict[str, Any]) -> list[str]:
    rows = []
    for r in report["records"]:
        ratios = " | ".join(f"{r['ms'][way] / r['ms']['saap']:.2f}" for way in PEERS)
        rows.append(f"| {case(r)} | {ratios} |")
    return rows


def case(r: dict[str, Any]) -> str:
    return f"{r['context'] // 1024}k, batch {r['batch']}"


def head(first: str, *others: str) -> list[str]:
    return [f"| {' | '.join([first, *others])} |", "|---|" + "---:|" * len(others)]


def main() -> int:
    folder = Path(sys.argv[1])
    report = json.loads((folder / "gpu.json").read_text())
    decode = json.loads((folder / "gpu_decode.json").read_text())
    about, records = report["environment"], report["records"]
    table = "\n".join(
        [
            f"{about['device']}, torch {about['torch']}, Triton {about['triton']}, commit "
            f"{about['commit']}; a copy within its memory moves {report['copy_gbps']:,.0f} GB/s.",
            "",
            *head("attention alone", "ms", "best other, ms", "times as fast"),
            *attention_rows([r for r in records if "ms" in r]),
            "",
            *head(
                "a step of a store",
                "visited",
                "choosing alone, ms",
                "all kernels, ms",
                "with the host, ms",
            ),
            *step_rows([r for r in records if "ms" in r or "us" in r]),
            "",
            *head(f"ms a token, {decode['layers']} layers", "visited", *WAYS.values()),
            *decode_rows(decode),
            "",
            *head("times as fast as", *(WAYS[way] for way in PEERS)),
            *ratio_rows(decode),
        ]
    )
    put_table(ROOT / "docs" / "gpu.md", COMMAND, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
