"""Time per token of pretrained models: transformers' own cache, ours densely, ours sparsely.

    python -m benchmarks.steps [--models smollm2] [--threads 2]     # needs `make models`

Whole decode steps after a context of real text, in turns, as `saap advise` times them. Figures go
to `$OUT`, else to `benchmarks/results/<device>/steps.json`, and then into `docs/real_models.md`.
"""

import argparse
import statistics

import torch

from saap import hf
from saap.eval import advise
from saap.eval.corpora import read_named
from saap.eval.tasks.base import text_tokens
from saap.eval.variants import Variant
from saap.methods import find_method

from .cpu import cpu_name, environment
from .reports import ROOT, put_table, report_path, write

CORPUS, COMMAND = "prose2", "python -m benchmarks.steps"
CONTEXTS = {"smollm2": (2048, 4096, 8128), "gemma3-270m": (8192, 16384, 32704)}
SHARES = (0.05, 0.1, 0.2)


def measure(name: str) -> list[dict]:
    model, tokenizer = hf.load_model(name), hf.load_tokenizer(name)
    text = b"\n".join(read_named(CORPUS))
    variant = Variant("saap", find_method("saap")())
    records = []
    for context in CONTEXTS[name]:
        read = hf.read_context(model, text_tokens(tokenizer, text, context, 0, 1), chunk=1024)
        points = variant.points(SHARES, context, "group")
        times = advise.timed(model, read, variant.method, points)
        record = {"model": name, "context": context, "ms": {}, "speedup": {}}
        for way, own in times.items():
            record["ms"][str(way)] = statistics.median(own)
            pairs = zip(times["dense"], own, strict=True)
            record["speedup"][str(way)] = statistics.median(d / o for d, o in pairs)
        records.append(record)
        print(record, flush=True)
    return records


def table(records: list[dict]) -> str:
    shares = [f"saap, {share:.0%}" for share in SHARES]
    head = ["model", "context", "transformers", "dense", *shares]
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for r in records:
        ms = r["ms"]
        cells = [f"{ms['transformers']:.0f} ms", f"{ms['dense']:.0f} ms"]
        cells += [f"{ms[str(s)]:.0f} ms, {r['speedup'][str(s)]:.2f}x" for s in SHARES]
        lines.append(f"| {r['model']} | {r['context']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="smollm2", help="comma-separated")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    before = environment()
    records = [r for name in options.models.split(",") for r in measure(name)]
    write(report_path(cpu_name(), "steps.json"), {"environment": before, "records": records})
    put_table(ROOT / "docs" / "real_models.md", COMMAND, table(records))
    print(table(records))


if __name__ == "__main__":
    main()
