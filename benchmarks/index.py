"""Build, growth and reopening of `AsymmetricIVF`: seconds and bytes at the size of one layer.

    python -m benchmarks.index                        # 131072 keys x 8 KV heads x 128, nlist 1024
    python -m benchmarks.index --keys 16384 --nlist 256
    python -m benchmarks.index --device cuda          # FAISS's GPU classes, for pip's faiss-gpu

Keys are random, drawn around directions of unequal weight so that buckets are unequal, as those of
attention keys are: right for time and bytes, no measure of recall (`benchmarks.selectors` is).
Every time is given twice, on the clock and as time on the cores (`_cpu`), which other processes of
a shared machine hardly change. A file is opened in processes of their own and from the page cache:
what is measured is the work of opening, not the disk. JSON goes to `$OUT`, else to
`benchmarks/results/<device>/index.json`.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from saap.index import ivf_file
from saap.index.ivf import AsymmetricIVF

from .cpu import cpu_name, environment
from .cpu_timing import load
from .reports import ROOT, report_path, write

N_QUERY_HEADS_PER_KV = 4
OPENINGS = 7


def clustered(heads: int, n: int, dim: int, n_directions: int, seed: int) -> torch.Tensor:
    """Keys `[heads, n, dim]` around directions of unequal weight, which a head's seeds share."""
    generator = torch.Generator().manual_seed(1)
    centers = torch.randn(heads, n_directions, dim, generator=generator)
    weights = torch.rand(n_directions, generator=generator) ** 2 + 0.01
    generator = torch.Generator().manual_seed(seed)
    out = torch.empty(heads, n, dim)
    for head in range(heads):
        member = torch.multinomial(weights, n, replacement=True, generator=generator)
        torch.randn(n, dim, generator=generator, out=out[head])
        out[head].mul_(0.7).add_(centers[head, member])
    return out


class Clock:
    """Wall and core seconds of a block; waits for the GPU when there is one."""

    def __enter__(self):
        self._wait()
        self._begin = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_):
        self._wait()
        self.wall = time.perf_counter() - self._begin[0]
        self.cpu = time.process_time() - self._begin[1]

    @staticmethod
    def _wait() -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()


def timed(name: str, unit: str, call: Callable[[], object], repeats: int = 1) -> dict[str, float]:
    """`name_unit` and `name_cpu_unit`: medians over the repeats."""
    clocks = []
    for _ in range(repeats):
        with Clock() as clock:
            call()
        clocks.append(clock)
    return in_units(name, unit, clocks)


def in_units(name: str, unit: str, clocks: list[Clock]) -> dict[str, float]:
    scale = {"s": 1, "ms": 1e3, "us": 1e6}[unit]
    return {
        f"{name}_{unit}": scale * statistics.median(c.wall for c in clocks),
        f"{name}_cpu_{unit}": scale * statistics.median(c.cpu for c in clocks),
    }


def measure_build(options, keys: torch.Tensor) -> tuple[dict, AsymmetricIVF]:
    heads, _, dim = keys.shape
    index = AsymmetricIVF(dim, heads, options.nlist, device=options.device)
    sample = keys[:, : options.train_points]
    report = {"train_points_a_head": sample.shape[1]}
    report |= timed("train", "s", lambda: index.train(sample))
    report |= timed("add", "s", lambda: (index.add(keys), index.flush()))
    report["bytes"] = index.nbytes
    report["bytes_over_keys"] = index.nbytes / keys.nbytes
    report["imbalance"] = float(index.statistics().imbalance.mean())
    q = torch.randn(1, heads * N_QUERY_HEADS_PER_KV, dim, device=options.device)
    nprobe = report["nprobe"] = max(1, options.nlist // 32)
    report |= timed("select", "ms", lambda: index.select(q, nprobe=nprobe), 15)
    report |= timed("faiss_copy", "s", lambda: index.search(q, 100, nprobe))
    report |= timed("search_top100", "ms", lambda: index.search(q, 100, nprobe), 15)
    report["bytes_with_faiss"] = index.nbytes
    report["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return report, index


def measure_growth(options, index: AsymmetricIVF) -> dict:
    """The first merge into full buffers copies them into larger ones; later ones have room."""
    more = clustered(index.n_kv, 1, index.d, options.nlist, seed=5).to(options.device)
    index._faiss = None  # appended to without FAISS's copy, as where FAISS is not searched
    return timed("first_merge", "s", lambda: (index.add(more), index.flush()))


def measure_append(options, index: AsymmetricIVF, flush_every: int) -> dict:
    """One token at a time until the pending keys have been merged `options.flushes` times."""
    index.flush_every = flush_every
    more = clustered(index.n_kv, flush_every, index.d, options.nlist, seed=7).to(options.device)
    plain, merging = [], []
    with Clock() as whole:
        for _ in range(options.flushes):
            for token in range(flush_every):
                with Clock() as clock:
                    index.add(more[:, token : token + 1])
                (plain if index.n_pending else merging).append(clock)
    tokens = options.flushes * flush_every
    return {
        "flush_every": flush_every,
        **in_units("add", "us", plain),
        **in_units("merge", "ms", merging),
        "amortised_us_a_token": 1e6 * whole.wall / tokens,
        "amortised_cpu_us_a_token": 1e6 * whole.cpu / tokens,
    }


OPEN = """
import sys, time
from saap.index.ivf import AsymmetricIVF
from saap.index import ivf_file
import torch
torch.ones(2, 2) @ torch.ones(2, 2)
begin = time.perf_counter(), time.process_time()
index = AsymmetricIVF.load(sys.argv[1], device=sys.argv[2])
opened = time.perf_counter(), time.process_time()
index.select(torch.randn(1, 4 * index.n_kv, index.d, device=sys.argv[2]), nprobe=1)
done = time.perf_counter()
print(opened[0] - begin[0], opened[1] - begin[1], done - opened[0])
"""


def measure_opening(path: Path, device: str) -> dict:
    """Each in a new process: what `load` takes there, imports aside, and the first `select`."""
    found = []
    for _ in range(OPENINGS):
        done = subprocess.run(
            [sys.executable, "-c", OPEN, str(path), device],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        found.append([1e3 * float(seconds) for seconds in done.stdout.split()])
    wall, cpu, first = zip(*found, strict=True)
    return {
        "open_ms": statistics.median(wall),
        "open_least_ms": min(wall),
        "open_most_ms": max(wall),
        "open_cpu_ms": statistics.median(cpu),
        "first_select_ms": statistics.median(first),
        "processes": OPENINGS,
    }


def measure_file(index: AsymmetricIVF, device: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index.safetensors"
        report = timed("save", "s", lambda: index.save(path))
        report["file_bytes"] = path.stat().st_size
        report |= measure_opening(path, device)
        return report | timed("verify", "s", lambda: ivf_file.verify(path))


def rounded(value):
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def result_path(device: str) -> Path:
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    return report_path(name, "index.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", type=int, default=131072)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--nlist", type=int, default=1024)
    parser.add_argument("--train-points", type=int, default=65536, help="keys a head for k-means")
    parser.add_argument("--flush-every", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--flushes", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--note", default="", help="about the machine, kept in the report")
    parser.add_argument("--out", type=Path, help="instead of the results folder")
    options = parser.parse_args()
    described = environment()
    keys = clustered(options.heads, options.keys, options.dim, options.nlist, seed=0)
    build, index = measure_build(options, keys.to(options.device))
    report = {
        "what": f"{options.keys} random clustered keys x {options.heads} KV heads x "
        f"{options.dim}, float32, nlist {options.nlist}, on {options.device}",
        "note": options.note,
        "environment": described,
        "build": build,
        "file": measure_file(index, options.device),
    }
    report["growth"] = measure_growth(options, index)
    report["append"] = [measure_append(options, index, f) for f in options.flush_every]
    described["load_after"] = load()
    report = rounded(report)
    path = options.out or result_path(options.device)
    write(path, report)
    print(json.dumps(report, indent=1))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
