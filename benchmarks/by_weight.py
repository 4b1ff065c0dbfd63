"""Rows where attention is: budgets by weight beside budgets by rows, on a pretrained model.

    python -m benchmarks.by_weight [--texts 8]     # needs SmolLM2: `make models`

The least weight and the importance of layers are found on the manual of PostgreSQL, and judged on
the documentation of Python, by how far next-token distributions are from those of dense attention.
Figures go to `$OUT`, else to `benchmarks/results/<device>/by_weight.json`, and then into
`docs/routing.md`.
"""

import argparse
import dataclasses

import torch

from saap import hf
from saap.budget import Budget
from saap.eval import by_weight
from saap.eval.corpora import read_named
from saap.eval.tasks.base import text_tokens
from saap.methods import find_method

from .cpu import cpu_name, environment
from .reports import ROOT, put_table, report_path, write

MODEL, LEARNED_FROM, JUDGED = "smollm2", "prose", "prose2"
COMMAND = "python -m benchmarks.by_weight"
CONTEXT, SHARES, N_LEARNED, N_TOKENS = 4096, (0.05, 0.1), 2, 64


# What is measured, in this order, as records and as the table name it.
ARMS = {
    "rows": "`max_tokens`",
    "oracle, rows": "`max_tokens`, chosen by true weights (`oracle-tokens`)",
    "by weight": "`min_weight`, all layers alike",
    "by weight and importance": "`min_weight`, `layer_importance`",
    "by weight and importance, weight x 1.5": "the same, 1.5 times the weight",
    "by weight and importance, weight x 2": "the same, twice the weight",
}


def fewer(budget: Budget, factor: float) -> Budget:
    """By weight, about so many times fewer rows: they fall as the least weight rises."""
    return dataclasses.replace(budget, min_weight=factor * budget.min_weight)


def told(measured: list[by_weight.Measured]) -> list[dict]:
    return [
        {"name": name, **dataclasses.asdict(m)} for name, m in zip(ARMS, measured, strict=True)
    ]


def measure(model, tokenizer, n_texts: int) -> dict:
    saap, oracle = find_method("saap")(), find_method("oracle-tokens")()
    texts = {}
    for corpus, count in ((LEARNED_FROM, N_LEARNED), (JUDGED, n_texts)):
        text = b"\n".join(read_named(corpus))
        texts[corpus] = [
            text_tokens(tokenizer, text, CONTEXT, number, count) for number in range(count)
        ]

    def progress(what: str, done: int, total: int) -> None:
        if done % 10 == 0 or done == total:
            print(f"{what}: {done} of {total}", flush=True)

    options = {"n_tokens": N_TOKENS, "progress": progress}
    records = {}
    for share in SHARES:
        window = CONTEXT // 32
        budget = Budget.for_selectivity(share, CONTEXT, window=window, estimate_rest=False)
        plain, best = by_weight.learn(model, saap, texts[LEARNED_FROM], budget, **options)
        tried = [budget, plain, best, fewer(best, 1.5), fewer(best, 2)]
        found = by_weight.measure(model, saap, texts[JUDGED], tried, **options)
        found[1:1] = by_weight.measure(model, oracle, texts[JUDGED], [budget], **options)
        records[str(share)] = told(found)
        print(table(records), flush=True)
    return records


def table(records: dict) -> str:
    head = [f"{float(s):.0%}: visited | {float(s):.0%}: nats from dense" for s in records]
    lines = [
        f"| a step's rows are bounded by | {' | '.join(head)} |",
        "|---|" + "---:|---:|" * len(records),
    ]
    for i, name in enumerate(ARMS.values()):
        cells = [f"{own[i]['rows']:,.0f} | {own[i]['divergence']:.4f}" for own in records.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=8)
    options = parser.parse_args()
    model, tokenizer = hf.load_model(MODEL), hf.load_tokenizer(MODEL)
    records = measure(model, tokenizer, options.texts)
    report = {
        "environment": environment(), "model": MODEL, "context": CONTEXT, "judged": JUDGED,
        "texts": options.texts, "learned_from": LEARNED_FROM, "records": records,
    }  # fmt: skip
    write(report_path(cpu_name(), "by_weight.json"), report)
    put_table(ROOT / "docs" / "routing.md", COMMAND, table(records))


if __name__ == "__main__":
    main()
