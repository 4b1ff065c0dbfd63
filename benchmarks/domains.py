"""Which text teaches: coordinates learned from prose and from code, judged on both.

    python -m benchmarks.domains [--tokens 8128]     # needs SmolLM2: `make models`

`saap` learns two covariances for each KV head, from the prompt itself or, in an index, from other
text. Here the last tokens of a text choose 5 % of the rows, sinks and window counted in, by codes
in coordinates of the text itself, of other texts, and of several together. Told is the share of
the middle's attention that is found, over that of the same number of rows by true weights. Figures
go to `$OUT`, else to `benchmarks/results/<device>/domains.json`, and then into
`docs/real_models.md`.
"""

import argparse

from saap import hf
from saap.index.coordinates import balanced
from saap.index.moments import MomentSums
from saap.methods.saap import SaapSearch

from .cpu import cpu_name, environment
from .reports import ROOT, put_table, report_path, write
from .reuse import (
    MODEL,
    N_FIRST,
    N_JUDGED,
    full_layers,
    layer_of,
    read,
    rows_chosen,
    vectors_of,
)

COMMAND = "python -m benchmarks.domains"
TEXTS = {"PostgreSQL's manual": "prose", "Python's manual": "prose2", "Python code": "code"}
JUDGED = ("Python's manual", "Python code")
ITSELF, ALL = "the text itself", "the other two together"


def learned(context, others: list, number: int) -> dict:
    """Coordinates of each other text and of all of them, by name."""
    found = {ITSELF: None}
    sums = MomentSums()
    for name, other in others:
        latest, k = vectors_of(other, number)
        own = MomentSums()
        for each in (own, sums):
            each.add(latest.flatten(0, 1), k)
        found[name] = balanced(own.moments())
    return {**found, ALL: balanced(sums.moments())}


def judge(contexts: dict, name: str, layers: list, count: int) -> dict[str, float]:
    context = contexts[name]
    others = [(other, contexts[other]) for other in TEXTS if other != name]
    mass: dict[str, float] = {}
    best = 0.0
    for info in layers:
        for label, own in learned(context, others, info.number).items():
            layer = layer_of(context, info, own)
            width = SaapSearch().candidates(count, layer.mass.shape[-1])
            for t in range(N_FIRST, N_FIRST + N_JUDGED):
                found, _ = layer.found(t, layer.candidates(t, width), count)
                mass[label] = mass.get(label, 0.0) + found
                if own is None:
                    best += layer.most(t, count)
        print(f"{name}, layer {info.number}", flush=True)
    return {label: own / best for label, own in mass.items()}


def table(found: dict[str, dict[str, float]]) -> str:
    columns = [ITSELF, *TEXTS, ALL]
    lines = [
        f"| judged on | learned from {' | '.join(columns)} |",
        "|---|" + "---:|" * len(columns),
    ]
    for name, own in found.items():
        cells = [f"{own[c]:.1%}" if c in own else "–" for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8128)
    options = parser.parse_args()
    model, tokenizer = hf.load_model(MODEL), hf.load_tokenizer(MODEL)
    contexts = {}
    for name, corpus in TEXTS.items():
        contexts[name] = read(model, tokenizer, corpus, options.tokens)
        print(f"read {name}", flush=True)
    layers, count = full_layers(model), rows_chosen(options.tokens)
    found = {name: judge(contexts, name, layers, count) for name in JUDGED}
    report = {"environment": environment(), "tokens": options.tokens, "found": found}
    write(report_path(cpu_name(), "domains.json"), report)
    put_table(ROOT / "docs" / "real_models.md", COMMAND, table(found))
    print(table(found))


if __name__ == "__main__":
    main()
