"""Every selector on captured keys and queries of the reference model: recall against bytes read.

    python -m benchmarks.selectors                     # 8192 tokens, trains an index first
    python -m benchmarks.selectors --index FILE        # one that `saap train --baselines` wrote
    python -m benchmarks.selectors --tokens 2048 --texts 1 --out selectors.json

The last queries of held-out texts ask the context before them, in every layer and head, at equal
budgets. Raw records go to `$OUT`, else to `benchmarks/results/<device>/selectors.json`, and in the
latter case `docs/selectors.md` is made from them: one table of all selectors, and one of what a
few Lloyd steps on the context change (`benchmarks.refinement`).
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from saap import hf
from saap.budget import Budget
from saap.eval import reference
from saap.eval.cli.demo import training_sequences
from saap.eval.tasks.attention import LayerProblem, layout_of
from saap.eval.tasks.base import text_tokens
from saap.kv import KVStore
from saap.kv.ranges import LOCAL
from saap.methods import METHODS, Method
from saap.methods.hnsw import HNSW, HNSWSearch
from saap.methods.lsh import LSH, LSHBuild
from saap.methods.moments import Moments, MomentsBuild, MomentsPages
from saap.methods.pq import PQ, PQBuild
from saap.methods.snapshot import middle_weights
from saap.selector import LayerInfo
from saap.trained_index import TrainedIndex
from saap.training import train

from .cpu import cpu_name, environment
from .cpu_timing import load
from .reports import ROOT, report_path
from .selectors_page import page, table

N_QUERIES, TOP_K, N_SINK = 32, 100, 16
PAGE = ROOT / "docs" / "selectors.md"

VARIANTS: dict[str, Callable[[TrainedIndex], Method]] = {
    "moments, rank 4": lambda index: Moments(index, build=MomentsBuild(rank=4)),
    "moments-pages, rank 4": lambda _: MomentsPages(build=MomentsBuild(rank=4)),
    "hnsw, ef 512": lambda _: HNSW(search=HNSWSearch(ef=512)),
    "pq, 4 dimensions a code": lambda _: PQ(build=PQBuild(dims=4)),
    "lsh, 150 tables of 10 bits": lambda _: LSH(build=LSHBuild(n_bits=10, n_tables=150)),
}
"""Methods with more to read than by default."""


def visited(starts: Tensor, lengths: Tensor, n_middle: int) -> Tensor:
    """Which rows of the middle the ranges `[n, H, R]` cover, bool `[n, H, M]`."""
    edges = torch.zeros(*starts.shape[:2], n_middle + 1, dtype=torch.int32)
    ones = (lengths > 0).int()
    starts = starts * ones  # that of an unused range may be any number
    edges.scatter_add_(-1, starts.long(), ones)
    edges.scatter_add_(-1, (starts + lengths).long(), -ones)
    return edges.cumsum(-1)[..., :-1] > 0


def top_k_found(problem: LayerProblem, store: KVStore, budget: Budget, true: Tensor) -> Tensor:
    """Share of the true top rows `[n, Hq, k]`, in time order, that is visited: `[n, Hq]`."""
    positions = problem.n_context + torch.arange(problem.n_queries)
    ranges = store.select(problem.q_rope, problem.q_derope, budget, positions=positions)
    starts, lengths = (t[..., LOCAL:] for t in ranges)
    rows = visited(starts - problem.first, lengths, problem.stop - problem.first)
    # Row i of the store's middle is that of another token in every head.
    tokens = store.rows.tokens[:, :, problem.first : problem.stop].long() - problem.first
    tokens = tokens.repeat_interleave(rows.shape[1] // problem.n_kv, 1)
    rows = torch.zeros_like(rows).scatter_(-1, tokens.expand_as(rows), rows)
    rows = rows.repeat_interleave(true.shape[1] // rows.shape[1], 1)
    return rows.gather(-1, true).float().mean(-1)


class Question:
    """One layer of one text: what every selector is asked, and the truth."""

    def __init__(self, read: hf.ReadContext, info: LayerInfo, shares: list[float]):
        n_context = read.length - len(read.queries[info.number][0])
        self.budgets = {
            share: Budget.for_selectivity(
                share,
                n_context,
                n_sink=N_SINK,
                window=n_context // 32,
                estimate_rest=False,
            )
            for share in shares
        }
        self.layer = info.number
        self.problem = problem = LayerProblem(read, info, layout_of(self.budgets[shares[0]]))
        keys = problem.k_rope[0, :, problem.first : problem.stop]
        self.true = middle_weights(info, keys, problem.q_rope).topk(TOP_K).indices

    def records(self, method: Method) -> list[dict]:
        """One for each budget. Sums over queries and heads, bytes of a step of this layer."""
        first = next(iter(self.budgets.values()))
        begin = time.process_time()
        store = self.problem.store_for(method, first)
        # Some selectors are built by the first query alone.
        store.select(self.problem.q_rope[:1], self.problem.q_derope[:1], first)
        build_cpu_s = round(time.process_time() - begin, 4)
        found = []
        for share, budget in self.budgets.items():
            hits = top_k_found(self.problem, store, budget, self.true)
            sums = self.problem.measure(store, budget)
            found.append(
                {
                    "layer": self.layer,
                    "share": share,
                    "recall@100": round(float(hits.mean()), 5),
                    "middle_mass": round(sum(sums["middle_mass"]), 5),
                    "middle_caught": round(sum(sums["middle_caught"]), 5),
                    "bytes": round(sums["bytes_read"]),
                    "bytes_choosing": round(sums["router_bytes"]),
                    "build_cpu_s": build_cpu_s,
                }
            )
        return found


def trained(options, model, text: bytes) -> TrainedIndex:
    if options.index:
        return TrainedIndex.load(options.index)
    print("training an index, as `saap demo` does", flush=True)
    return train(model, training_sequences(text, options.tokens, options.seed), baselines=True)


def about(options, index: TrainedIndex) -> dict:
    n_context = options.tokens - N_QUERIES
    kept = ("nlist", "n_segments", "context", "seed", "corpus")
    return {
        "tokens": options.tokens,
        "texts": options.texts,
        "queries": N_QUERIES,
        "n_sink": N_SINK,
        "window": n_context // 32,
        "shares": options.shares,
        "index": {name: index.metadata[name] for name in kept},
        "model": {
            name: index.metadata["model"][name]
            for name in ("num_layers", "num_heads", "num_kv_heads", "head_dim")
        },
    }


def main() -> None:
    from .refinement import partitions

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--texts", type=int, default=2, help="held-out texts that are asked")
    parser.add_argument("--index", type=Path, help="file that `saap train --baselines` wrote")
    parser.add_argument("--seed", type=int, default=0, help="of training, without --index")
    parser.add_argument("--out", type=Path, help="instead of the results folder; makes no page")
    options = parser.parse_args()
    described = environment()
    model, tokenizer = hf.load_model(reference.FOLDER), hf.load_tokenizer(reference.FOLDER)
    training_text, text = reference.split_held_out()
    index = trained(options, model, training_text)
    methods = {name: kind(index) for name, kind in METHODS.items()}
    methods |= {name: make(index) for name, make in VARIANTS.items()}
    records, refined = [], []
    for number in range(options.texts):
        tokens = text_tokens(tokenizer, text, options.tokens, number, options.texts)
        read = hf.read_context(model, tokens, n_queries=N_QUERIES)
        for info in (layer.info for layer in hf.model_layers(model)):
            question = Question(read, info, options.shares)
            for name, method in methods.items():
                for record in question.records(method):
                    records.append({"method": name, "text": number, **record})
            refined += [{"text": number, **r} for r in partitions(question, index)]
            print(f"text {number}, layer {info.number}: done", flush=True)
    report = {
        "environment": {**described, "load_after": load()},
        "about": about(options, index),
        "records": records,
        "refinement": refined,
    }
    path = options.out or report_path(cpu_name(), "selectors.json")
    path.write_text(json.dumps(report, separators=(",", ":")) + "\n")
    if not (options.out or "OUT" in os.environ):
        folder = path.parent.relative_to(ROOT).as_posix()
        PAGE.write_text(page(json.loads(path.read_text()), folder))
    print(f"{table(report)}\n\nwrote {path}")


if __name__ == "__main__":
    main()
