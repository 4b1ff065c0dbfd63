"""What an estimate of the rows that are left out is worth (`Budget.estimate_rest`).

    python -m benchmarks.rest [--texts 6] [--context 4096]     # needs SmolLM2: `make models`

At the same number of rows, how far are next-token distributions from those of dense attention (KL
divergence, the mean over the last 64 tokens of each text of Python's documentation), with the
estimate and without, for rows that `saap` chooses and for those of the largest true weights?
Figures go to `$OUT`, else to `benchmarks/results/<device>/rest.json`, and then into
`docs/routing.md`, after each text.
"""

import argparse

from saap import hf
from saap.budget import Budget
from saap.eval.by_weight import against, logits
from saap.eval.decoding import decoder, whole
from saap.methods import find_method

from .by_text import options_of, over_texts
from .reports import ROOT

MODEL, JUDGED, N_TOKENS = "smollm2", "prose2", 64
SHARES = (0.02, 0.03, 0.05, 0.1)
METHODS, ESTIMATES = ("saap", "oracle-tokens"), (False, True)
COMMAND = "python -m benchmarks.rest"


def measure(model, tokens, context: int) -> list[dict]:
    """Records of one text: nats and bytes for each method and share, with an estimate or not."""
    read, rest = hf.read_context(model, tokens[:-N_TOKENS]), tokens[-N_TOKENS:]
    found, dense = [], None
    for name in METHODS:
        first = Budget.for_selectivity(SHARES[0], context)
        with decoder(model, read, find_method(name)(), first, N_TOKENS) as own:
            layers = own.cache.saap_layers
            if dense is None:
                dense = logits(own, rest, [whole(first)] * len(layers))
            for share in SHARES:
                for estimate in ESTIMATES:
                    budget = Budget.for_selectivity(share, context, estimate_rest=estimate)
                    ((nats, rows),) = against(dense, own, rest, [budget])
                    read_bytes = sum(layer.store.bytes_read for layer in layers) / len(layers)
                    found.append({"method": name, "share": share, "estimate": estimate,
                                  "nats": nats, "rows": rows, "bytes": read_bytes})  # fmt: skip
    return found


def table(records: list[dict], context: int) -> str:
    """Means over texts."""
    lines = [
        f"| of {context:,} tokens | rows of | nats, left out | nats, estimated | kB, left out "
        "| kB, estimated |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for share in SHARES:
        for name in METHODS:
            cells = [f"{share:.0%}", f"`{name}`"]
            for key, form, factor in (("nats", "{:.4f}", 1), ("bytes", "{:,.0f}", 1e-3)):
                for estimate in ESTIMATES:
                    own = [
                        r[key] for r in records
                        if (r["method"], r["share"], r["estimate"]) == (name, share, estimate)
                    ]  # fmt: skip
                    cells.append(form.format(factor * sum(own) / len(own)))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=4096)
    options = options_of(parser)
    context = options.context
    over_texts(
        lambda model, tokens: measure(model, tokens, context),
        lambda records: table(records, context),
        model=MODEL, judged=JUDGED, context=context, n_texts=options.texts,
        file="rest.json", page=ROOT / "docs" / "routing.md", command=COMMAND,
    )  # fmt: skip


if __name__ == "__main__":
    main()
