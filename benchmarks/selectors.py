"""Every selector on captured data of the reference model: recall against bytes, in one table.

    python -m benchmarks.selectors [--tokens 8192] [--shares 0.05 0.1] [--index FILE] [--out FILE]

`recall@100`: share of each query head's true top 100 rows of the middle that were visited;
`mass`: captured middle mass over middle mass, summed over layers, heads and queries. Bytes
are those of one layer's step: keys and values of the visited rows and what choosing reads. Without
an index file one is trained on the other part of the held-out text.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor

from saap import hf
from saap.budget import Budget
from saap.eval import reference
from saap.eval.tasks.answering import encode
from saap.eval.tasks.attention import LayerProblem, capture
from saap.methods import METHODS
from saap.methods.base import middle_weights
from saap.trained_index import TrainedIndex
from saap.training import default_window, train

N_QUERIES, TOP_K, N_SINK = 32, 100, 16


def visited(starts: Tensor, lengths: Tensor, n_middle: int) -> Tensor:
    """Which rows of the middle the ranges cover, bool `[n, H, M]`."""
    edges = torch.zeros(*starts.shape[:2], n_middle + 1, dtype=torch.int32)
    ones = (lengths > 0).int()
    edges.scatter_add_(-1, starts.long(), ones)
    edges.scatter_add_(-1, (starts + lengths).long(), -ones)
    return edges.cumsum(-1)[..., :-1] > 0


def top_k_found(problem: LayerProblem, selector, budget: Budget, true: Tensor) -> float:
    """Share of the true top rows `[n, Hq, k]`, in time order, that the selection covers."""
    ranges = selector.select(problem.q_rope, problem.q_derope, budget)
    rows = visited(*ranges, problem.stop - problem.first)
    if selector.order is not None:
        order = selector.order.repeat_interleave(rows.shape[1] // problem.n_kv, 1)
        rows = torch.zeros_like(rows).scatter_(-1, order.expand_as(rows), rows)
    rows = rows.repeat_interleave(true.shape[1] // rows.shape[1], 1)
    return float(rows.gather(-1, true).float().mean())


def measure(taken, index: TrainedIndex, budget: Budget, name: str) -> dict:
    begin = time.perf_counter()
    recalls, mass, caught, nbytes, choosing = [], 0.0, 0.0, 0.0, 0.0
    for layer in sorted(taken.caches):
        problem = LayerProblem(taken, layer, budget.n_sink, budget.window)
        true = middle_weights(problem.keys, problem.q_rope).topk(TOP_K).indices
        selector = METHODS[name](index).build(problem.keys)
        recalls.append(top_k_found(problem, selector, budget, true))
        found = problem.measure(selector, problem.store_for(selector), budget)
        mass += sum(found["middle_mass"])
        caught += sum(found["middle_caught"])
        nbytes += found["bytes_read"] / len(taken.caches)
        choosing += found["router_bytes"] / len(taken.caches)
    return {
        "method": name,
        "recall@100": round(sum(recalls) / len(recalls), 4),
        "mass": round(caught / mass, 4),
        "bytes": round(nbytes),
        "bytes_choosing": round(choosing),
        "seconds": round(time.perf_counter() - begin, 2),
    }


def trained(options, model, tokenizer, text: bytes) -> TrainedIndex:
    if options.index:
        return TrainedIndex.load(options.index)
    step = (len(text) - options.tokens) // options.texts
    pieces = [text[i * step : i * step + 8 * options.tokens] for i in range(options.texts)]
    tokens = [encode(tokenizer, piece)[: options.tokens] for piece in pieces]
    return train(model, tokens, steps=options.steps, baselines=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.05, 0.1])
    parser.add_argument("--index", type=Path, help="file that `saap train --baselines` wrote")
    parser.add_argument("--texts", type=int, default=16, help="to train on, without --index")
    parser.add_argument("--steps", type=int, default=1000, help="of the router, without --index")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args()
    model, tokenizer = hf.load_model(reference.FOLDER), hf.load_tokenizer(reference.FOLDER)
    training_text, text = reference.split_held_out()
    index = trained(options, model, tokenizer, training_text)
    taken = capture(
        model, encode(tokenizer, text[: 8 * options.tokens])[: options.tokens], N_QUERIES
    )
    n_context = options.tokens - N_QUERIES
    rows = []
    for share in options.shares:
        budget = Budget.for_selectivity(
            share, n_context, n_sink=N_SINK, window=default_window(n_context)
        )
        print(f"\n{options.tokens} tokens, {share:.0%} of the cache, one selection a KV group")
        print(f"{'method':15}{'recall@100':>11}{'mass':>8}{'KB a step':>11}{'choosing':>10}")
        for name in METHODS:
            row = {"share": share, **measure(taken, index, budget, name)}
            rows.append(row)
            print(
                f"{name:15}{row['recall@100']:11.1%}{row['mass']:8.1%}"
                f"{row['bytes'] / 1e3:11.1f}{row['bytes_choosing'] / 1e3:10.1f}",
                flush=True,
            )
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
