"""How a block of queries should choose rows: single ones or runs, by which scores.

    python -m benchmarks.prefill_choice [--model smollm2] [--tokens 6144]

Queries and keys of a text that was read densely; blocks of 128 queries at four places choose 10 %
of the rows before them for each KV head, sinks, window and block counted in. Told is the share of
the attention mass between sinks and window that the chosen rows hold, over all layers, and the
relative error of the output. `scored` is how much of all products of queries and keys a choice
computes. Figures go to `$OUT`, else to `benchmarks/results/<device>/prefill_choice.json`, and then
into `docs/scale.md`.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from saap import hf
from saap.eval.corpora import read_named
from saap.eval.tasks.base import text_tokens

from .cpu import cpu_name, environment
from .reports import ROOT, put_table, report_path, write

COMMAND = "python -m benchmarks.prefill_choice"
BLOCK, SINKS, WINDOW, SHARE = 128, 16, 256, 0.1


def weights_of(queries: Tensor, k: Tensor, scale: float) -> Tensor:
    """Softmax weights of all rows `[Hkv, n]`, added over queries `[Hkv, G, m, D]`."""
    return (queries @ k[:, None].mT * scale).softmax(-1).sum((1, 2))


def averaged(n: int) -> Callable[[Tensor, Tensor, float], Tensor]:
    return lambda q, k, scale: weights_of(q.unflatten(2, (-1, n)).mean(3), k, scale)


def sampled(n: int) -> Callable[[Tensor, Tensor, float], Tensor]:
    return lambda q, k, scale: weights_of(q[:, :, n - 1 :: n], k, scale)


def antidiagonal(n: int) -> Callable[[Tensor, Tensor, float], Tensor]:
    """Sums of scores along antidiagonals of n by n, as XAttention has them (arXiv 2503.16428)."""

    def weigh(q, k, scale):
        rows = k.shape[1] // n * n
        keys = k[:, :rows].unflatten(1, (-1, n)).flip(2).flatten(2)
        weights = weights_of(q.unflatten(2, (-1, n)).flatten(3), keys, scale / n)
        weights = weights.repeat_interleave(n, 1) / n
        return torch.nn.functional.pad(weights, (0, k.shape[1] - rows))

    return weigh


# Label, rows of a run, scores of the rows (None: the true weights), share of scores computed.
WAYS = (
    ("true weights", 1, None, "1"),
    ("true weights", 16, None, "1"),
    ("true weights", 64, None, "1"),
    ("antidiagonals of 16", 64, antidiagonal(16), "1/16"),
    ("every 16th query", 1, sampled(16), "1/16"),
    ("means of 16 queries", 1, averaged(16), "1/16"),
    ("every 8th query", 1, sampled(8), "1/8"),
    ("means of 8 queries", 64, averaged(8), "1/8"),
    ("means of 8 queries", 1, averaged(8), "1/8"),
    ("means of 4 queries", 1, averaged(4), "1/4"),
    ("means of 2 queries", 1, averaged(2), "1/2"),
)


def measure(context, layer, at: int) -> dict:
    """Mass and squared error of each way for the block that begins at token `at`."""
    k, v, _ = (t[0] for t in context.keys(layer.info.number))
    latest = context.latest[layer.info.number][0]
    first = at - (context.length - latest.shape[1])
    q = latest[:, first : first + BLOCK].unflatten(0, (len(k), -1))
    end, scale = at + BLOCK, layer.info.sm_scale
    rows = torch.arange(end)
    scores = q @ k[:, None, :end].mT * scale
    scores = scores.masked_fill(rows > torch.arange(at, end)[:, None], -torch.inf)
    true = scores.softmax(-1)
    exact = true @ v[:, None, :end]
    middle = slice(SINKS, at - WINDOW)
    mass = true[..., middle].sum((1, 2))
    count = int(SHARE * end) - SINKS - WINDOW - BLOCK
    found = {"mass": float(mass.sum()), "size": float((exact**2).sum())}
    for label, run, weigh, _ in WAYS:
        weights = mass if weigh is None else weigh(q, k[:, :at], scale)[:, middle]
        padding = -weights.shape[1] % run
        runs = torch.nn.functional.pad(weights, (0, padding)).unflatten(1, (-1, run)).sum(-1)
        best = torch.zeros_like(runs).scatter(1, runs.topk(max(1, count // run), 1).indices, 1)
        chosen = best.repeat_interleave(run, 1)[:, : weights.shape[1]].bool()
        seen = torch.ones(len(k), end, dtype=torch.bool)
        seen[:, middle] = chosen
        out = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1) @ v[:, None, :end]
        found[f"{label}, {run}"] = (float(mass[chosen].sum()), float(((out - exact) ** 2).sum()))
    return found


def table(records: list[dict]) -> str:
    lines = [
        "| choice by | scored | runs of | mass of the middle | output error |",
        "|---|---:|---:|---:|---:|",
    ]
    mass = sum(r["mass"] for r in records)
    for label, run, _, scored in WAYS:
        own = [r[f"{label}, {run}"] for r in records]
        errors = [error / r["size"] for (_, error), r in zip(own, records, strict=True)]
        lines.append(
            f"| {label} | {scored} | {run} | {sum(caught for caught, _ in own) / mass:.1%} | "
            f"{(sum(errors) / len(errors)) ** 0.5:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=6144)
    options = parser.parse_args()
    model, tokenizer = hf.load_model(options.model), hf.load_tokenizer(options.model)
    text = b"\n".join(read_named("prose2"))
    tokens = text_tokens(tokenizer, text, options.tokens, 0, 1)
    context = hf.read_context(model, tokens, chunk=2048)
    places = [options.tokens - 2048 + 512 * i + 256 for i in range(4)]
    records = [
        {"layer": layer.info.number, "at": at, **measure(context, layer, at)}
        for layer in hf.model_layers(model)
        if layer.is_full
        for at in places
    ]
    report = {"environment": environment(), "tokens": options.tokens, "records": records}
    write(report_path(cpu_name(), "prefill_choice.json"), report)
    put_table(ROOT / "docs" / "scale.md", COMMAND, table(records))
    print(table(records))


if __name__ == "__main__":
    main()
