"""A context of 1M tokens whose keys and values lie in files, under a limit of memory.

    python -m benchmarks.tiers --folder /path/on/a/disk [--tokens 1048576] [--layers 5]

Layers in the shape of SmolLM2's (9 query heads, 3 KV heads of 64) over random keys and values, in
float32; queries have a cosine of 0.9 to those of the step before, or are new. Some layers all in
memory, and all in files, within a control group whose limit is a share of keys and values; page
cache counts there. Then the reference model's own steps, for the hits of queries that a text
asks. Figures go to `$OUT`, else to `benchmarks/results/<device>/tiers.json`, and then into
`docs/scale.md`.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import saap
from saap import Budget, KVStore, LayerInfo
from saap.context_folder import ContextFolder
from saap.kv.file_rows import FileRows, RowReads
from saap.methods import find_method

from .cpu import cpu_name, environment
from .memory_limit import MemoryGroup, anonymous_memory
from .reports import ROOT, put_table, report_path, write

COMMAND = "python -m benchmarks.tiers"
HEADS, N_KV, DIM, CHUNK, LAST = 9, 3, 64, 2048, 64
BUDGET = Budget(max_tokens=4096, flush_every=256)
WARM, STEPS = 3, 12
COSINES = (0.9, 0.0)
FAST = 14 * 2**20  # bytes of rows in memory, of a layer: with less, steps look into the files


class Stack:
    """So many layers, each a store of its own."""

    def __init__(self, layers: int, folder: Path | None, fast_memory: int):
        self.folder = None if folder is None else ContextFolder(folder, new=True)
        self.stores = []
        for number in range(layers):
            rows = None
            if folder is not None:
                rows = FileRows(self._create(number), fast_memory // layers)
            selector = find_method("saap")().selector(LayerInfo(DIM**-0.5))
            self.stores.append(KVStore(selector, BUDGET, rows=rows))

    def _create(self, number: int):
        return lambda like: self.folder.create(number, like)

    def fill(self, tokens: int) -> None:
        """Random tokens, layer by layer; the last few bring queries, to learn from."""
        for number, store in enumerate(self.stores):
            rng = torch.Generator().manual_seed(number)
            store.capacity = tokens + 1024
            for start in range(0, tokens, CHUNK):
                n = min(CHUNK, tokens - LAST - start)
                k, v = torch.randn(2, 1, N_KV, n, DIM, generator=rng)
                store.append(k, v, k)
            k, v = torch.randn(2, 1, N_KV, LAST, DIM, generator=rng)
            q = torch.randn(1, HEADS, LAST, DIM, generator=rng)
            store.append(k, v, k)
            store.attend(q, q)

    def steps(self, count: int, cosine: float) -> dict:
        """Milliseconds of a step of a layer, and what was read for it."""
        rng = torch.Generator().manual_seed(round(100 * cosine))
        queries = torch.randn(len(self.stores), 1, HEADS, 1, DIM, generator=rng)
        times, before = [], RowReads()
        for number in range(WARM + count):
            fresh = torch.randn(queries.shape, generator=rng)
            queries = cosine * queries + (1 - cosine**2) ** 0.5 * fresh
            k, v = torch.randn(2, 1, N_KV, 1, DIM, generator=rng)
            if number == WARM:
                before = self.reads()
            began = time.perf_counter()
            for store, q in zip(self.stores, queries, strict=True):
                store.step(k, v, k, q, q)
            times.append(1000 * (time.perf_counter() - began))
        reads = self.reads()
        asked = reads.asked - before.asked
        return {
            "ms": statistics.median(times[WARM:]) / len(self.stores),
            "hit_rate": (reads.hits - before.hits) / asked if asked else None,
            "bytes_read": (reads.bytes_read - before.bytes_read) / count / len(self.stores),
        }

    def reads(self) -> RowReads:
        return sum((s.rows.reads for s in self.stores if s.in_file), RowReads())


def child(options: argparse.Namespace) -> None:
    """One stack, in memory or in files; prints what it found."""
    folder = None if options.folder is None else Path(options.folder)
    stack = Stack(options.layers, folder, options.fast_memory)
    began = time.perf_counter()
    stack.fill(options.tokens)
    found = {"fill_s": time.perf_counter() - began, "steps": {}}
    print("filled", found["fill_s"], anonymous_memory(), file=sys.stderr, flush=True)
    began = time.perf_counter()
    stack.steps(1, 0.5)
    found["first_s"] = time.perf_counter() - began
    print("first", found["first_s"], anonymous_memory(), file=sys.stderr, flush=True)
    for cosine in COSINES:
        found["steps"][str(cosine)] = stack.steps(STEPS, cosine)
        print(cosine, found["steps"][str(cosine)], file=sys.stderr, flush=True)
    found["anonymous"] = anonymous_memory()
    found["held"] = sum(store.nbytes for store in stack.stores)
    if folder is not None:  # the same steps, without memory of our own
        for store in stack.stores:
            store.rows.fast_bytes = None
        found["mapped"] = stack.steps(1, COSINES[0])
    print(json.dumps(found))


def measured(options: argparse.Namespace, limit: int | None, folder: str | None) -> dict:
    command = [sys.executable, "-m", "benchmarks.tiers", "--child"]
    layers = options.inside_layers if limit is None else options.layers
    for name in ("tokens", "threads", "fast_memory"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    command += ["--layers", str(layers)]
    kept = {"stdout": subprocess.PIPE, "text": True, "cwd": ROOT, "check": True}
    if limit is None:
        return json.loads(subprocess.run(command, **kept).stdout.splitlines()[-1])
    group = MemoryGroup(limit)
    try:
        done = group.run([*command, "--folder", folder], **kept)
        return {**json.loads(done.stdout.splitlines()[-1]), "peak": group.peak, "limit": limit}
    finally:
        group.close()


@torch.no_grad()
def of_a_text(fast_share: float = 0.1) -> dict:
    """Hits of the reference model's own steps, fast memory a tenth of its keys and values."""
    from saap import hf
    from saap.eval import reference
    from saap.eval.tasks.answering import encode

    model, tokenizer = (load(reference.FOLDER) for load in (hf.load_model, hf.load_tokenizer))
    tokens = encode(tokenizer, reference.split_held_out()[1])[None, :8000]
    budget = Budget(max_tokens=256, window=64)
    with saap.attached(model, budget=budget) as attached, tempfile.TemporaryDirectory() as folder:
        config = model.config
        row = 2 * config.num_key_value_heads * config.head_dim * 4
        kv = config.num_hidden_layers * row * tokens.shape[1]
        cache = attached.cache(directory=folder, fast_memory=round(fast_share * kv))
        for part in tokens[:, :-128].split(2048, 1):
            model(part, **hf.over(cache))
        for n in range(tokens.shape[1] - 128, tokens.shape[1]):
            if n == tokens.shape[1] - 96:
                before = cache.reads
            model(tokens[:, n : n + 1], **hf.over(cache))
        asked = cache.reads.asked - before.asked
        found = {"tokens": tokens.shape[1], "rows": 256, "fast_share": fast_share}
        found["hit_rate"] = (cache.reads.hits - before.hits) / asked
        cache.close()
    return found


def table(report: dict) -> str:
    inside, files = report["inside"], report["files"]
    gib, mib = 2**30, 2**20
    lines = [
        "| keys and values | queries | a step of a layer | rows in memory | read for it |",
        "|---|---|---:|---:|---:|",
    ]
    names = {"0.9": "cosine 0.9 to the last", "0.0": "new each time"}

    def line(where, query, found):
        hits = "" if found["hit_rate"] is None else f"{found['hit_rate']:.0%}"
        read = "" if found["hit_rate"] is None else f"{found['bytes_read'] / mib:.2f} MiB"
        lines.append(f"| {where} | {query} | {found['ms']:,.1f} ms | {hits} | {read} |")

    fast = f"in files, {report['fast_memory'] / mib:.0f} MiB of rows in memory"
    for cosine, name in names.items():
        line("in memory, no limit", name, inside["steps"][cosine])
    for cosine, name in names.items():
        line(fast, name, files["steps"][cosine])
    line("in files, mapped", names["0.9"], files["mapped"])
    text = report["text"]
    lines += [
        "",
        f"({report['tokens']:,} tokens, {report['layers']} layers, "
        f"{report['kv_bytes'] / gib:.2f} GiB of keys and values, in a control group of "
        f"{files['limit'] / gib:.2f} GiB, page cache counted in; "
        f"{files['anonymous'] / gib:.2f} GiB were no pages of files. In memory: "
        f"{report['inside_layers']} of them. Steps of the reference model over "
        f"{text['tokens']:,} bytes of text, "
        f"{text['rows']} rows of the middle, a tenth of its keys and values in memory: "
        f"{text['hit_rate']:.0%} of the rows were there.)",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", help="a new or empty folder on a disk with room")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=2**20)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--inside-layers", type=int, default=1, help="layers all in memory")
    parser.add_argument("--fast-memory", type=int, help=f"bytes, all layers; {FAST} for each")
    parser.add_argument("--share", type=float, default=0.1, help="limit, of keys and values")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        child(options)
        return
    if options.fast_memory is None:
        options.fast_memory = FAST * options.layers
    if options.folder is None:
        parser.error("--folder must be given: a new or empty folder on a disk with room")
    kv_bytes = options.tokens * options.layers * 2 * N_KV * DIM * 4
    report = {
        "environment": environment(), "threads": options.threads, "tokens": options.tokens,
        "layers": options.layers, "inside_layers": options.inside_layers,
        "fast_memory": options.fast_memory, "kv_bytes": kv_bytes,
    }  # fmt: skip
    report["text"] = of_a_text()
    try:
        report["files"] = measured(options, round(options.share * kv_bytes), options.folder)
    finally:
        shutil.rmtree(options.folder, ignore_errors=True)
    report["inside"] = measured(options, None, None)
    write(report_path(cpu_name(), "tiers.json"), report)
    put_table(ROOT / "docs" / "scale.md", COMMAND, table(report))
    print(table(report))


if __name__ == "__main__":
    main()
