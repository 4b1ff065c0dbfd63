"""Does what `saap` learned from a prompt hold as the context grows? Recall by length.

    python -m benchmarks.drift [--texts 2]     # needs SmolLM2: `make models`

Coordinates are learned from the first 1,024 tokens of a text (queries and keys), or from all of
it; the codes of later tokens use them. The last 32 queries then ask the context, at 5 % of the
rows. Both are held against the rows with the largest true weights. Figures go to `$OUT`, else to
`benchmarks/results/<device>/drift.json`, and then into `docs/real_models.md`.
"""

import argparse

import torch

from saap import hf
from saap.budget import Budget
from saap.eval.corpora import read_named
from saap.eval.tasks.attention import LayerProblem
from saap.eval.tasks.base import text_tokens
from saap.kv import KVStore
from saap.methods import find_method
from saap.training import default_window

from .cpu import cpu_name, environment
from .reports import ROOT, put_table, report_path, write

MODEL, CORPUS, COMMAND = "smollm2", "prose2", "python -m benchmarks.drift"
LEARNED, CONTEXTS, SHARE, N_QUERIES = 1024, (2048, 4096, 8192), 0.05, 32
EVERY = 3
"""One layer of so many is measured."""


def grown(problem: LayerProblem, first: hf.ReadContext, method, budget: Budget) -> KVStore:
    """A store that learned from the tokens of `first` and then was given all others."""
    number = problem.info.number
    store = KVStore(method.selector(problem.info), budget)
    keys = [t[:, :, : problem.n_context] for t in problem.keys]
    store.append(*(t[:, :, :LEARNED] for t in keys))
    store.selector.observe(first.latest[number], [first.latest[number].shape[2]])
    store.settle()
    store.append(*(t[:, :, LEARNED:] for t in keys))
    return store


def measure(model, tokenizer, text: bytes, n_texts: int) -> list[dict]:
    saap, oracle = find_method("saap")(), find_method("oracle-tokens")()
    layers = [layer.info for layer in hf.model_layers(model) if layer.is_full][::EVERY]
    records = []
    for number in range(n_texts):
        tokens = text_tokens(tokenizer, text, max(CONTEXTS), number, n_texts)
        first = hf.read_context(model, tokens[:LEARNED])
        for context in CONTEXTS:
            read = hf.read_context(model, tokens[:context], n_queries=N_QUERIES)
            n = context - N_QUERIES
            places = {"n_sink": 16, "window": default_window(n)}
            budget = Budget.for_selectivity(SHARE, n, **places)
            for info in layers:
                problem = LayerProblem(read, info, Budget(max_tokens=0, **places))
                stores = {
                    "oracle": problem.store_for(oracle, budget),
                    "all": problem.store_for(saap, budget),
                    "prompt": grown(problem, first, saap, budget),
                }
                for name, store in stores.items():
                    found = problem.measure(store, budget)
                    records.append(
                        {
                            "text": number, "context": context, "layer": info.number,
                            "learned_from": name, "caught": sum(found["middle_caught"]),
                            "mass": sum(found["middle_mass"]),
                            "error": found["output_error"] / found["queries"],
                        }
                    )  # fmt: skip
            print(f"text {number}, {context:,} tokens: done", flush=True)
    return records


def table(records: list[dict]) -> str:
    def recall(context: int, name: str) -> float:
        own = [r for r in records if (r["context"], r["learned_from"]) == (context, name)]
        return sum(r["caught"] for r in own) / sum(r["mass"] for r in own)

    lines = [
        f"| context | oracle | learned from all | learned from the first {LEARNED:,} tokens |",
        "|---|---|---|---|",
    ]
    for context in CONTEXTS:
        cells = " | ".join(f"{recall(context, name):.1%}" for name in ("oracle", "all", "prompt"))
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
