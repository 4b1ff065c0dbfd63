"""How long an index of a pretrained model takes to train, and what less text or fewer steps cost.

    make models
    python -m benchmarks.less_training [--texts 12] [--context 8192]

`saap train` on PostgreSQL's manual: with all texts and steps, and with a quarter of both. `saap
eval` over each index, on Python's manual at 5 % of the rows, sinks and window counted in. Each
index is trained in a process of its own, whose time is told, the loading of the model and the
reading of the corpus included. What a report holds already is not measured again. Figures go to
`$OUT`, else to `benchmarks/results/<device>/less_training.json`, and then into `docs/training.md`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from saap.eval.scores import read_scores

from .cpu import cpu_name, environment
from .reports import ROOT, markdown, put_table, report_path, write

COMMAND = "python -m benchmarks.less_training"
MODEL, SHARE, STEPS, LESS = "smollm2", "0.05", 400, 4
JUDGED_TEXTS = 2
METHODS = ("mlp", "blend", "kmeans-cells")
CLI = [sys.executable, "-m", "saap.eval.cli"]


def train(texts: int, steps: int, context: int, out: Path) -> float:
    """Seconds that it took."""
    began = time.monotonic()
    command = [
        *CLI, "train", MODEL, "--corpus", "prose", "--context", str(context),
        "--texts", str(texts), "--steps", str(steps), "--out", str(out),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return time.monotonic() - began


def judge(index: Path, context: int, out: Path) -> dict[str, dict[str, float]]:
    """Recall of the middle and output error of each method."""
    command = [
        *CLI, "eval", MODEL, "--corpus", "prose2", "--contexts", str(context),
        "--tasks", "attention", "--methods", ",".join(METHODS), "--budgets", SHARE,
        "--texts", str(JUDGED_TEXTS), "--index", str(index), "--out", str(out),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return {
        s["method"]: {name: s[name] for name in ("recall_middle", "output_error")}
        for s in read_scores(out)
        if s["budget"] == SHARE
    }


def table(records: list[dict]) -> str:
    head = ["texts", "steps", "minutes", *(f"`{m}`: recall | error" for m in METHODS)]
    rows = []
    for r in records:
        row = [str(r["texts"]), str(r["steps"]), f"{r['seconds'] / 60:.0f}"]
        for method in METHODS:
            own = r["scores"][method]
            row += [f"{own['recall_middle']:.1%}", f"{own['output_error']:.3f}"]
        rows.append(row)
    return markdown(" | ".join(head).split(" | "), rows, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=12)
    parser.add_argument("--context", type=int, default=8192)
    options = parser.parse_args()
    few, short = max(1, options.texts // LESS), STEPS // LESS
    path = report_path(cpu_name(), "less_training.json")
    before = json.loads(path.read_text()) if path.is_file() else {}
    records = before["records"] if before.get("context") == options.context else []
    done = {(r["texts"], r["steps"]) for r in records}
    all_ways = ((options.texts, STEPS), (few, short))
    ways = [way for way in all_ways if way not in done]
    with tempfile.TemporaryDirectory() as folder:
        for number, (texts, steps) in enumerate(ways):
            index = Path(folder) / f"{number}.safetensors"
            seconds = train(texts, steps, options.context, index)
            scores = judge(index, options.context, Path(folder) / f"{number}")
            records.append({"texts": texts, "steps": steps, "seconds": seconds, "scores": scores})
            report = {
                "environment": environment(),
                "context": options.context,
                "records": records,
            }
            write(path, report)
            put_table(ROOT / "docs" / "training.md", COMMAND, table(records))
    print(table(records))


if __name__ == "__main__":
    main()
