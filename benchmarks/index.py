"""Build, growth and reopening of `AsymmetricIVF`: seconds and bytes at the size of one layer.

    python -m benchmarks.index                        # 131072 keys x 8 KV heads x 128, nlist 1024
    python -m benchmarks.index --keys 16384 --nlist 256 --out results.json

Keys are drawn around random directions, so that buckets are unequal, as those of attention keys
are. One line of JSON goes to standard output, or to `--out`. A file is opened from the page cache:
what is measured is the work of opening, not the disk.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from saap.index import ivf_file, kmeans
from saap.index.ivf import AsymmetricIVF

N_QUERY_HEADS_PER_KV = 4


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


def seconds(call: Callable[[], object], repeats: int = 1) -> float:
    """Median wall time."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def mean_cosine(x: torch.Tensor, centroids: torch.Tensor) -> float:
    """How well centroids fit: the mean cosine of a vector and its centroid."""
    buckets = kmeans.assign(x, centroids).long()[..., None].expand_as(x)
    return float(torch.nn.functional.cosine_similarity(x, centroids.gather(1, buckets), -1).mean())


def measure_build(options, keys) -> tuple[dict, AsymmetricIVF]:
    heads, _, dim = keys.shape
    index = AsymmetricIVF(dim, heads, options.nlist)
    sample = keys[:, : options.train_points]
    train_s = seconds(lambda: index.train(sample))
    add_s = seconds(lambda: (index.add(keys), index.flush()))
    held = index.nbytes
    q = torch.randn(1, heads * N_QUERY_HEADS_PER_KV, dim)
    nprobe = max(1, options.nlist // 32)
    copy_s = seconds(lambda: index.search(q, 100, nprobe))
    return {
        "train_s": train_s,
        "train_points_a_head": sample.shape[1],
        "add_s": add_s,
        "bytes": held,
        "bytes_over_keys": held / keys.nbytes,
        "faiss_copy_s": copy_s,
        "bytes_with_faiss": index.nbytes,
        "search_top100_ms": 1e3 * seconds(lambda: index.search(q, 100, nprobe), 9),
        "select_ms": 1e3 * seconds(lambda: index.select(q, nprobe=nprobe), 9),
        "nprobe": nprobe,
        "imbalance": float(index.statistics().imbalance.mean()),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }, index


def measure_append(options, keys, centroids, flush_every: int) -> dict:
    """One token at a time until the pending keys have been merged `options.flushes` times."""
    index = AsymmetricIVF.from_trained(centroids, flush_every=flush_every)
    index.add(keys)
    index.flush()
    more = clustered(keys.shape[0], flush_every, keys.shape[2], options.nlist, seed=7)
    plain, merging = [], []
    for _ in range(options.flushes):
        for token in range(flush_every):
            begin = time.perf_counter()
            index.add(more[:, token : token + 1])
            spent = time.perf_counter() - begin
            (plain if index.n_pending else merging).append(spent)
    total = sum(plain) + sum(merging)
    return {
        "flush_every": flush_every,
        "add_us": 1e6 * statistics.median(plain),
        "merge_ms": 1e3 * statistics.median(merging),
        "amortised_us_a_token": 1e6 * total / (options.flushes * flush_every),
    }


def measure_file(index: AsymmetricIVF) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index.safetensors"
        save_s = seconds(lambda: index.save(path))
        return {
            "save_s": save_s,
            "file_bytes": path.stat().st_size,
            "open_ms": 1e3 * seconds(lambda: AsymmetricIVF.load(path), 9),
            "verify_s": seconds(lambda: ivf_file.verify(path)),
        }


def measure_refinement(options, centroids, heads: int, dim: int) -> list[dict]:
    """Trained centroids on another context: as they are, refined, and trained from scratch."""
    context = clustered(heads, options.train_points, dim, options.nlist, seed=11)
    context += 0.5 * torch.randn(heads, 1, dim, generator=torch.Generator().manual_seed(12))
    found = [{"n_iter": 0, "s": 0.0, "mean_cosine": mean_cosine(context, centroids)}]
    for n_iter in (1, 3):
        begin = time.perf_counter()
        refined = kmeans.refine_centroids(context, centroids, n_iter=n_iter)
        spent = time.perf_counter() - begin
        found.append({"n_iter": n_iter, "s": spent, "mean_cosine": mean_cosine(context, refined)})
    begin = time.perf_counter()
    scratch = kmeans.train_centroids(context, options.nlist)
    spent = time.perf_counter() - begin
    found.append({"n_iter": "scratch", "s": spent, "mean_cosine": mean_cosine(context, scratch)})
    return found


def rounded(value):
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", type=int, default=131072)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--nlist", type=int, default=1024)
    parser.add_argument("--train-points", type=int, default=65536, help="keys a head for k-means")
    parser.add_argument("--flush-every", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--flushes", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    keys = clustered(options.heads, options.keys, options.dim, options.nlist, seed=0)
    build, index = measure_build(options, keys)
    report = {
        "what": f"{options.keys} keys x {options.heads} KV heads x {options.dim}, float32, "
        f"nlist {options.nlist}",
        "environment": {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
            "load_average": os.getloadavg()[0],
        },
        "build": build,
        "file": measure_file(index),
        "append": [measure_append(options, keys, index.centroids, f) for f in options.flush_every],
        "refinement": measure_refinement(options, index.centroids, options.heads, options.dim),
    }
    line = json.dumps(rounded(report))
    if options.out:
        options.out.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
