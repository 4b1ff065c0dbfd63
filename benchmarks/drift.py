"""Does what `saap` learned from a prompt hold as the context grows? Recall by length.

    python -m benchmarks.drift [--texts 2]     # needs SmolLM2: `make models`

Coordinates are learned from the first 1,024 tokens of a text (queries and keys), once or again
whenever the context has grown by half, or from all of it. The last 32 queries then ask the
context, at 5 % of the rows. All are held against the rows with the largest true weights. Figures
go to `$OUT`, else to `benchmarks/results/<device>/drift.json`, and then into
`docs/real_models.md`.
"""

import argparse
from contextlib import contextmanager
from unittest import mock

import torch

from saap import hf
from saap.budget import Budget
from saap.eval.corpora import read_named
from saap.eval.tasks.attention import LayerProblem, layout_of
from saap.eval.tasks.base import text_tokens
from saap.methods import find_method
from saap.methods import saap as saap_module

from .cpu import cpu_name, environment
from .reports import ROOT, put_table, report_path, write

MODEL, CORPUS, COMMAND = "smollm2", "prose2", "python -m benchmarks.drift"
LEARNED, PIECE, CONTEXTS, SHARE, N_QUERIES = 1024, 256, (2048, 4096, 8192), 0.05, 32
EVERY = 3
"""One layer of so many is measured."""


@contextmanager
def grown(model, tokens: torch.Tensor, budget: Budget, again: bool):
    """The stores of a cache that learned from the first tokens, and then read all others.

    `again`: whether it may learn again as the context grows, as it does where people use it.
    """
    growth = saap_module.GROWTH if again else float("inf")
    with (
        mock.patch.object(saap_module, "GROWTH", growth),
        hf.attached(model, method="saap", budget=budget) as saap_model,
    ):
        cache = saap_model.cache()
        model(tokens[None, :LEARNED], **hf.over(cache), logits_to_keep=1)
        model(tokens[None, LEARNED : LEARNED + 1], **hf.over(cache))  # learns
        for first in range(LEARNED + 1, len(tokens), PIECE):
            piece = tokens[None, first : first + PIECE]
            model(piece, **hf.over(cache), logits_to_keep=1)
        for layer in cache.saap_layers:
            layer.store.settle()
        yield [layer.store for layer in cache.layers]


def measure(model, tokenizer, text: bytes, n_texts: int) -> list[dict]:
    saap, oracle = find_method("saap")(), find_method("oracle-tokens")()
    records = []
    for number in range(n_texts):
        tokens = text_tokens(tokenizer, text, max(CONTEXTS), number, n_texts)
        for context in CONTEXTS:
            n = context - N_QUERIES
            read = hf.read_context(model, tokens[:context], n_queries=N_QUERIES)
            budget = Budget.for_selectivity(SHARE, n, window=n // 32)
            layers = [layer.info for layer in hf.model_layers(model) if layer.is_full][::EVERY]
            problems = [LayerProblem(read, i, layout_of(budget)) for i in layers]

            def note(name, stores, context=context, number=number, problems=problems):
                for problem, store in zip(problems, stores, strict=True):
                    found = problem.measure(store, store.budget)
                    records.append(
                        {
                            "text": number, "context": context, "layer": problem.info.number,
                            "learned_from": name, "caught": sum(found["middle_caught"]),
                            "mass": sum(found["middle_mass"]),
                            "error": found["output_error"] / found["queries"],
                        }
                    )  # fmt: skip

            note("oracle", [p.store_for(oracle, budget) for p in problems])
            note("all", [p.store_for(saap, budget) for p in problems])
            for again in (False, True):
                with grown(model, tokens[:n], budget, again) as stores:
                    note("again" if again else "once", [stores[i.number] for i in layers])
            print(f"text {number}, {context:,} tokens: done", flush=True)
    return records


def table(records: list[dict]) -> str:
    def recall(context: int, name: str) -> float:
        own = [r for r in records if (r["context"], r["learned_from"]) == (context, name)]
        return sum(r["caught"] for r in own) / sum(r["mass"] for r in own)

    lines = [
        f"| context | oracle | from all | from {LEARNED:,} tokens, once | and again as it grows |",
        "|---|---|---|---|---|",
    ]
    for context in CONTEXTS:
        names = ("oracle", "all", "once", "again")
        cells = " | ".join(f"{recall(context, name):.1%}" for name in names)
        lines.append(f"| {context:,} | {cells} |")
    return "\n".join(lines)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=2)
    options = parser.parse_args()
    model, tokenizer = hf.load_model(MODEL), hf.load_tokenizer(MODEL)
    records = measure(model, tokenizer, b"\n".join(read_named(CORPUS)), options.texts)
    report = {"environment": environment(), "model": MODEL, "records": records}
    write(report_path(cpu_name(), "drift.json"), report)
    put_table(ROOT / "docs" / "real_models.md", COMMAND, table(records))
    print(table(records))


if __name__ == "__main__":
    main()
