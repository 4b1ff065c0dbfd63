"""How wide a window: most recent tokens that are always visited, against rows that are chosen.

    python -m benchmarks.window [--texts 6]     # needs SmolLM2: `make models`

At the same number of rows in all, how far are next-token distributions from those of dense
attention (KL divergence, the mean over the last 64 tokens of each text of Python's documentation)?
What other rows hold is not estimated, so that only those that are visited count.
Figures go to `$OUT`, else to `benchmarks/results/<device>/window.json`, and then into
`docs/budget.md`, after each text.
"""

import argparse

import torch

from saap import hf
from saap.budget import Budget
from saap.eval.by_weight import against, logits
from saap.eval.corpora import read_named
from saap.eval.decoding import decoder, whole
from saap.eval.tasks.base import text_tokens
from saap.eval.variants import N_SINK
from saap.methods import find_method

from .cpu import cpu_name, environment
from .reports import ROOT, put_table, report_path, write

MODEL, JUDGED, CONTEXT, N_TOKENS = "smollm2", "prose2", 4096, 64
SHARES, WINDOWS = (0.04, 0.05, 0.1), (128, 64, 32, 16)
METHODS = ("saap", "quest")
COMMAND = "python -m benchmarks.window"


def measure(model, tokens) -> list[dict]:
    """Records of one text: nats for each method, window and share."""
    read, rest = hf.read_context(model, tokens[:-N_TOKENS]), tokens[-N_TOKENS:]
    found, dense = [], None
    for name in METHODS:
        for window in WINDOWS:
            budgets = {
                s: Budget.for_selectivity(
                    s, CONTEXT, n_sink=N_SINK, window=window, estimate_rest=False
                )
                for s in SHARES
            }
            first = budgets[SHARES[0]]
            with decoder(model, read, find_method(name)(), first, N_TOKENS) as own:
                if dense is None:
                    dense = logits(own, rest, [whole(first)] * len(own.cache.saap_layers))
                measured = against(dense, own, rest, list(budgets.values()))
                for share, (nats, rows) in zip(budgets, measured, strict=True):
                    found.append({"method": name, "window": window, "share": share, "nats": nats,
                                  "rows": rows})  # fmt: skip
    return found


def table(records: list[dict]) -> str:
    """Means over texts."""
    head = " | ".join(f"{name}, {share:.0%}" for name in METHODS for share in SHARES)
    lines = [f"| window | {head} |", "|---:|" + "---:|" * (len(METHODS) * len(SHARES))]
    for window in WINDOWS:
        cells = []
        for name in METHODS:
            for share in SHARES:
                own = [
                    r["nats"] for r in records
                    if (r["method"], r["window"], r["share"]) == (name, window, share)
                ]  # fmt: skip
                cells.append(f"{sum(own) / len(own):.4f}")
        lines.append(f"| {window} | {' | '.join(cells)} |")
    return "\n".join(lines)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=6)
    parser.add_argument("--threads", type=int, help="torch's number of threads")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    model, tokenizer = hf.load_model(MODEL), hf.load_tokenizer(MODEL)
    text, records = b"\n".join(read_named(JUDGED)), []
    for number in range(options.texts):
        tokens = text_tokens(tokenizer, text, CONTEXT, number, options.texts)
        records += [{"text": number, **r} for r in measure(model, tokens)]
        report = {"environment": environment(), "model": MODEL, "context": CONTEXT,
                  "judged": JUDGED, "records": records}  # fmt: skip
        write(report_path(cpu_name(), "window.json"), report)
        put_table(ROOT / "docs" / "budget.md", COMMAND, table(records))
        print(table(records), flush=True)


if __name__ == "__main__":
    main()
