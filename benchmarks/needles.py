"""How many candidates a context needs: how far rows that matter fall behind by the coarse code.

    make models GEMMA=1
    python -m benchmarks.needles [--texts 2]

A *needle* is a row between the first and the most recent tokens that a query head gives a
twentieth of its attention or more. It is lost where it is not among the head's candidates, the
best rows by the coarse code. Told is the share of the needles' attention that is lost if a head
has one candidate for so many rows, over queries of the last 2,048 tokens of each text. Figures go
to `$OUT`, else to `benchmarks/results/<device>/needles.json`, and then into `docs/routing.md`.
"""

import argparse

import torch
from torch import Tensor

from saap import hf
from saap.eval.corpora import read_named
from saap.eval.tasks.base import text_tokens
from saap.index.coordinates import balanced
from saap.index.moments import Moments
from saap.kernels.codes import encode, layout
from saap.methods.saap import as_coded

from . import reuse
from .cpu import cpu_name, environment
from .reports import ROOT, markdown, put_table, report_path, write

COMMAND = "python -m benchmarks.needles"
CONTEXTS = (("smollm2", 8192), ("gemma3-270m", 16384), ("gemma3-270m", 32768))
ONE_OF = (64, 32, 16, 8, 4)
N_SINK = WINDOW = 16
LEAST, EVERY = 0.05, 16
"""A needle's attention; one of so many of the last tokens asks."""


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


def measure(model, tokenizer, n_tokens: int, number: int, n_texts: int) -> list[tuple]:
    """`ranks` of all heads of a text."""
    text = b"\n".join(read_named("prose2"))
    tokens = text_tokens(tokenizer, text, n_tokens, number, n_texts)
    context = hf.read_context(model, tokens, chunk=2048)
    found = []
    for info in reuse.full_layers(model):
        latest, k = reuse.vectors_of(context, info.number)
        own = as_coded(balanced(Moments.of(latest.flatten(1, 2), k)))
        coarse = layout.decode_coarse(encode(own.keys(k[None]), own.importance))[0]
        places = torch.arange(k.shape[1])[-latest.shape[2] :][EVERY - 1 :: EVERY]
        q = info.sm_scale * latest[:, :, EVERY - 1 :: EVERY]
        coded = q @ own.of_queries[0, :, None].mT
        found += [
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


def table(records: list[dict]) -> str:
    head = ["model", "context", "needles", *(f"one of {n}" for n in ONE_OF)]
    rows = [
        [r["model"], f"{r['tokens']:,}", f"{r['needles']:,}"]
        + [f"{r['lost'][n]:.3%}" for n in ONE_OF]
        for r in records
    ]
    return markdown(head, rows)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=2)
    options = parser.parse_args()
    records = []
    for name, n_tokens in CONTEXTS:
        model, tokenizer = hf.load_model(name), hf.load_tokenizer(name)
        found = []
        for number in range(options.texts):
            found += measure(model, tokenizer, n_tokens, number, options.texts)
        records.append(record(name, n_tokens, found))
        print(records[-1], flush=True)
        report = {"environment": environment(), "texts": options.texts, "records": records}
        write(report_path(cpu_name(), "needles.json"), report)
        put_table(ROOT / "docs" / "routing.md", COMMAND, table(records))


if __name__ == "__main__":
    main()
