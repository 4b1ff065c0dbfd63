"""How many candidates a context needs: how far rows that matter fall behind by the coarse code.

    make models GEMMA=1
    python -m benchmarks.needles [--texts 2]
    python -m benchmarks.needles --least [--texts 2]

A *needle* is a row between the first and the most recent tokens that a query head gives a
twentieth of its attention or more. It is lost where it is not among the head's candidates, the
best rows by the coarse code. Told is the share of the needles' attention that is lost if a head
has one candidate for so many rows, over queries of the last 2,048 tokens of each text. `--least`
compares what keys count at least where coordinates are learned, at one candidate for eight rows.
Figures go to `$OUT`, else to `benchmarks/results/<device>/needles.json` or `least_weight.json`,
and then into `docs/routing.md`.
"""

import argparse

import torch
from torch import Tensor

from saap import hf
from saap.eval.corpora import read_named
from saap.eval.tasks.base import text_tokens
from saap.eval.tasks.needle_rows import LEAST
from saap.index.coordinates import balanced
from saap.index.moments import LEAST_WEIGHT, Moments
from saap.kernels.codes import encode, layout
from saap.methods.saap import as_coded

from . import reuse
from .cpu import cpu_name, environment
from .reports import ROOT, markdown, put_table, report_path, write

COMMAND = "python -m benchmarks.needles"
CONTEXTS = (("smollm2", 8192), ("gemma3-270m", 16384), ("gemma3-270m", 32768))
COMPARED, LEAST_WEIGHTS = (("smollm2", 8192), ("gemma3-270m", 8192)), (0.0, 0.1, 0.25, 0.5, 1.0)
"""Where least weights are compared, and which: 1 is that all keys count alike."""

ONE_OF, COMPARED_AT = (64, 32, 16, 8, 4), 8
N_SINK = WINDOW = 16
EVERY = 16
"""One of so many of the last tokens asks."""


def ranks(q: Tensor, k: Tensor, coarse: Tensor, coded: Tensor, places: Tensor) -> tuple:
    """Of a head's needles their attention, how many rows are before them, and among how many.

    `q, coded [T, D]`: queries of the tokens at `places`, scaled, as they are and as codes want
    them; `k, coarse [n, D]`: keys and what their coarse codes stand for.
    """
    row = torch.arange(len(k))
    weights = (q @ k.T).masked_fill(row > places[:, None], -torch.inf).softmax(-1)
    middle = (row >= N_SINK) & (row <= places[:, None] - WINDOW)
    at, needle = ((weights >= LEAST) & middle).nonzero(as_tuple=True)
    scores = (coded @ coarse.T).masked_fill(~middle, -torch.inf)
    before = (scores[at] > scores[at, needle][:, None]).sum(-1)
    return weights[at, needle], before, middle.sum(-1)[at]


def measure(
    model, tokenizer, n_tokens: int, number: int, n_texts: int, leasts: tuple[float, ...]
) -> dict[float, list[tuple]]:
    """`ranks` of all heads of a text, by what keys count at least."""
    text = b"\n".join(read_named("prose2"))
    tokens = text_tokens(tokenizer, text, n_tokens, number, n_texts)
    context = hf.read_context(model, tokens, chunk=2048)
    found = {least: [] for least in leasts}
    for info in reuse.full_layers(model):
        latest, k = reuse.vectors_of(context, info.number)
        places = torch.arange(k.shape[1])[-latest.shape[2] :][EVERY - 1 :: EVERY]
        q = info.sm_scale * latest[:, :, EVERY - 1 :: EVERY]
        for least, of_heads in found.items():
            own = as_coded(balanced(Moments.of(latest.flatten(1, 2), k, least)))
            coarse = layout.decode_coarse(encode(own.keys(k[None]), own.importance))[0]
            coded = q @ own.of_queries[0, :, None].mT
            of_heads += [
                ranks(q[h, g], k[h], coarse[h], coded[h, g], places)
                for h in range(len(k))
                for g in range(q.shape[1])
            ]
        print(f"text {number}, layer {info.number}", flush=True)
    return found


def record(name: str, n_tokens: int, found: list[tuple]) -> dict:
    attention, before, rows = (torch.cat(parts) for parts in zip(*found, strict=True))
    lost = {
        n: float(attention[before >= (rows / n).ceil()].sum() / attention.sum()) for n in ONE_OF
    }
    return {"model": name, "tokens": n_tokens, "needles": len(attention), "lost": lost}


def table(records: list[dict], title: str, numbers: tuple[float, ...]) -> str:
    head = ["model", "context", "needles", *(f"{title} {n:g}" for n in numbers)]
    rows = [
        [r["model"], f"{r['tokens']:,}", f"{r['needles']:,}"]
        + [f"{r['lost'][n]:.3%}" for n in numbers]
        for r in records
    ]
    return markdown(head, rows)


def records_of(name: str, n_tokens: int, n_texts: int, leasts: tuple[float, ...]) -> list[dict]:
    """A record for each least weight."""
    model, tokenizer = hf.load_model(name), hf.load_tokenizer(name)
    found = {least: [] for least in leasts}
    for number in range(n_texts):
        own = measure(model, tokenizer, n_tokens, number, n_texts, leasts)
        for least in leasts:
            found[least] += own[least]
    return [record(name, n_tokens, own) for own in found.values()]


def compared(name: str, n_tokens: int, n_texts: int) -> dict:
    """One record of all least weights."""
    each = records_of(name, n_tokens, n_texts, LEAST_WEIGHTS)
    lost = {n: own["lost"][COMPARED_AT] for n, own in zip(LEAST_WEIGHTS, each, strict=True)}
    return {**each[0], "lost": lost}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=2)
    parser.add_argument("--least", action="store_true")
    options = parser.parse_args()
    records, command, name, columns = [], COMMAND, "needles.json", ("one of", ONE_OF)
    if options.least:
        command, name = f"{COMMAND} --least", "least_weight.json"
        columns = "least", LEAST_WEIGHTS
    for model, n_tokens in COMPARED if options.least else CONTEXTS:
        if options.least:
            records.append(compared(model, n_tokens, options.texts))
        else:
            records += records_of(model, n_tokens, options.texts, (LEAST_WEIGHT,))
        print(records[-1], flush=True)
        report = {"environment": environment(), "texts": options.texts, "records": records}
        write(report_path(cpu_name(), name), report)
        put_table(ROOT / "docs" / "routing.md", command, table(records, *columns))


if __name__ == "__main__":
    main()
