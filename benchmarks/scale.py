"""A layer's step with its context split over ranks.

    python -m benchmarks.scale [--threads 1] [--tokens 16384,131072] [--ranks 1,2]

One layer in the shape of SmolLM2's (9 query heads, 3 KV heads of 64) over random vectors. Ranks
are processes on this machine over gloo, so what they show is what is exchanged and what that
costs here, not a speed-up: they share cores. Figures go to `$OUT`, else to
`benchmarks/results/<device>/scale.json`, and then into `docs/scale.md`.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time

import torch

from saap import Budget, KVStore, LayerInfo, distributed
from saap.methods import find_method

from .cpu import cpu_name, environment
from .reports import ROOT, put_table, report_path, write

COMMAND = "python -m benchmarks.scale"
HEADS, N_KV, DIM, CHUNK, STEPS = 9, 3, 64, 2048, 32
BUDGET = Budget(max_tokens=4096)


def filled(store, tokens: int):
    """The store with so many random tokens."""
    torch.manual_seed(0)
    for start in range(0, tokens, CHUNK):
        n = min(CHUNK, tokens - start)
        k, v = torch.randn(2, 1, N_KV, n, DIM)
        store.append(k, v, k)
        if start + n == tokens:  # queries to learn from; what a chunk attends is not timed here
            q = torch.randn(1, HEADS, n, DIM)
            store.attend(q, q)
    return store


def steps(store) -> float:
    """Median milliseconds of a step; the first ones, which learn, do not count."""
    times = []
    for _ in range(STEPS + 2):
        k, v = torch.randn(2, 1, N_KV, 1, DIM)
        q = torch.randn(1, HEADS, 1, DIM)
        began = time.perf_counter()
        store.step(k, v, k, q, q)
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times[2:])


def new_store(**options):
    return KVStore(find_method("saap")().selector(LayerInfo(DIM**-0.5)), BUDGET, **options)


def as_rank(tokens: int) -> None:
    """One rank of a split layer; the first one prints what it found."""
    with distributed.joined() as group:
        selector = find_method("saap")().selector(LayerInfo(DIM**-0.5))
        parts = [tokens // group.size] * (group.size - 1)
        store = filled(distributed.SplitStore(selector, BUDGET, group, parts), tokens)
        steps(store)
        messages, sent = group.messages, group.bytes_sent
        found = {"ms": steps(store), "bytes_held": store.nbytes}
        # No step of the second round learns or flushes more than rows.
        found["messages"] = (group.messages - messages) / (STEPS + 2)
        found["bytes_sent"] = (group.bytes_sent - sent) / (STEPS + 2)
        if group.rank == 0:
            print(json.dumps(found))


def split(tokens: int, ranks: int, threads: int) -> dict:
    record = {"tokens": tokens, "ranks": ranks}
    if ranks == 1:
        store = filled(new_store(), tokens)
        steps(store)
        return {**record, "ms": steps(store), "bytes_held": store.nbytes}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "benchmarks.scale", "--rank-of", str(tokens)]
    command += ["--threads", str(threads)]
    place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = [
        subprocess.Popen(
            command, env={**os.environ, **place, "RANK": str(rank)}, stdout=subprocess.PIPE,
            text=True, cwd=ROOT,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    said = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit(f"a rank of {ranks} ended with an error")
    return {**record, **json.loads(said[0].splitlines()[-1])}


def tables(report: dict) -> str:
    lines = [
        "| tokens | ranks | a step | held by the first rank | messages | bytes sent by a rank |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for r in report["split"]:
        sent = (
            "none | none" if r["ranks"] == 1 else f"{r['messages']:.0f} | {r['bytes_sent']:,.0f}"
        )
        lines.append(
            f"| {r['tokens']:,} | {r['ranks']} | {r['ms']:.2f} ms | "
            f"{r['bytes_held'] / 2**20:.1f} MiB | {sent} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", default="16384,131072", help="comma-separated")
    parser.add_argument("--ranks", default="1,2", help="comma-separated")
    parser.add_argument("--rank-of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.rank_of is not None:
        as_rank(options.rank_of)
        return
    tokens = [int(n) for n in options.tokens.split(",")]
    report = {"environment": environment(), "threads": options.threads, "split": []}
    for n in tokens:
        for ranks in options.ranks.split(","):
            report["split"].append(split(n, int(ranks), options.threads))
            print(report["split"][-1], flush=True)
    write(report_path(cpu_name(), "scale.json"), report)
    put_table(ROOT / "docs" / "scale.md", COMMAND, tables(report))
    print(tables(report))


if __name__ == "__main__":
    main()
