"""How wide a window: most recent tokens that are always visited, against rows that are chosen.

    python -m benchmarks.window [--texts 6]     # needs SmolLM2: `make models`

At the same number of rows in all, how far are next-token distributions from those of dense
attention (KL divergence, the mean over the last 64 tokens of each text of Python's documentation)?
Figures go to `$OUT`, else to `benchmarks/results/<device>/window.json`, and then into
`docs/budget.md`, after each text.
"""

import argparse

from saap import hf
from saap.budget import Budget
from saap.eval.by_weight import against, logits
from saap.eval.decoding import decoder, whole
from saap.methods import find_method

from .by_text import options_of, over_texts
from .reports import ROOT

MODEL, JUDGED, CONTEXT, N_TOKENS = "smollm2", "prose2", 4096, 64
SHARES, WINDOWS = (0.02, 0.03, 0.05), (64, 32, 16, 4)
METHODS = ("saap", "quest")
COMMAND = "python -m benchmarks.window"


def measure(model, tokens) -> list[dict]:
    """Records of one text: nats for each method, window and share."""
    read, rest = hf.read_context(model, tokens[:-N_TOKENS]), tokens[-N_TOKENS:]
    found, dense = [], None
    for name in METHODS:
        for window in WINDOWS:
            budgets = {s: Budget.for_selectivity(s, CONTEXT, window=window) for s in SHARES}
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


def main() -> None:
    options = options_of(argparse.ArgumentParser(description=__doc__.splitlines()[0]))
    over_texts(
        measure, table, model=MODEL, judged=JUDGED, context=CONTEXT, n_texts=options.texts,
        file="window.json", page=ROOT / "docs" / "budget.md", command=COMMAND,
    )  # fmt: skip


if __name__ == "__main__":
    main()
