"""What a round of drafts and its verification cost, 8k to 128k tokens, over dense steps.

    python -m benchmarks.lossless_speed [--contexts 8192,32768,131072] [--threads 2]

Random weights of Llama-3.2-1B's shape, cut to two layers, over caches of random rows: drafts of
such a model say nothing, so the share that is accepted is assumed, as `benchmarks.lossless` finds
it on pretrained models. A round drafts n tokens with `saap`, forgets them, verifies them and
the token before in one forward over every row, and forgets what was not accepted. If each draft is
accepted with probability a, where those before it are, it gives 1 + a + ... + a**n tokens. Drafts,
verifications of several n, dense steps over our own store, and steps of `transformers` take turns.
JSON goes to `$OUT` or `benchmarks/results/<device>/lossless_speed.json`, the table to
`docs/lossless.md`.
"""

import argparse
import functools
import statistics
import sys

import torch
from transformers import DynamicCache

import saap
from saap import hf
from saap.budget import Budget
from saap.hf.few_rows import FewRows
from saap.hf.reading import DENSE

from .cpu import cpu_name, environment
from .cpu_timing import load, paired_ratio, take_turns
from .decode import filled, llama_1b_two_layers
from .reports import ROOT, put_table, report_path, write

COMMAND = "python -m benchmarks.lossless_speed"
DRAFTS, MAX_TOKENS = (2, 4, 8), 4096
ACCEPTED = (0.9, 0.95)
"""Share of drafts that is accepted: `benchmarks.lossless` finds 0.86 to 0.96 at 5 and 10 %."""


def measure(models: list, context: int, seconds: float) -> dict:
    """Milliseconds of each way in each round of turns. A block has a model of its own."""
    plain_model, dense_model, own_model = models
    about = hf.describe(plain_model)
    shape = (1, about["num_kv_heads"], context, about["head_dim"])
    layers = [torch.randn(2, *shape) for _ in range(about["num_layers"])]
    plain = DynamicCache(config=plain_model.config)
    for number, (k, v) in enumerate(layers):
        plain.update(k, v, number)
    token = torch.tensor([[5]])
    with (
        saap.attached(dense_model, budget=DENSE, method="dense") as dense_block,
        saap.attached(own_model, budget=Budget(max_tokens=MAX_TOKENS)) as own_block,
    ):
        dense = filled(dense_block, layers, context)
        own = filled(own_block, layers, context)

        def draft():
            with own.drafting():
                for _ in range(DRAFTS[1]):
                    own_model(token, **hf.over(own))

        def verify(drafts: int):
            with FewRows():  # as `generate()` does
                own_model(token.expand(1, drafts + 1), **hf.over(own))
            own.crop(-drafts - 1)

        turns = {
            "drafts": [draft],
            **{f"verification of {n}": [functools.partial(verify, n)] for n in DRAFTS},
            "dense": [lambda: dense_model(token, **hf.over(dense))] * 4,
            "transformers": [lambda: plain_model(token, **hf.over(plain))],
        }
        spent = take_turns(turns, seconds)
    spent["draft"] = [ms / DRAFTS[1] for ms in spent.pop("drafts")]
    return spent


def about_context(context: int, spent: dict) -> dict:
    rounds = {}
    for n in DRAFTS:
        verification = spent[f"verification of {n}"]
        ms = [n * one + whole for one, whole in zip(spent["draft"], verification, strict=True)]
        rounds[str(n)] = {
            "verification_in_steps": paired_ratio(verification, spent["dense"]),
            "faster": {
                other: {str(a): tokens(a, n) * paired_ratio(spent[other], ms) for a in ACCEPTED}
                for other in ("dense", "transformers")
            },
        }
    return {
        "context": context,
        "ms": {name: statistics.median(ms) for name, ms in spent.items()},
        "rounds": rounds,
        "raw_ms": spent,
    }


def tokens(accepted: float, drafts: int) -> float:
    """How many a round gives."""
    return sum(accepted**n for n in range(drafts + 1))


def table(records: list[dict]) -> str:
    dense = " | ".join(f"{a:.0%} accepted, over dense" for a in ACCEPTED)
    lines = [
        "| context | dense step | a draft | drafts in a round | verification, in dense steps | "
        f"{dense} | {ACCEPTED[-1]:.0%}, over `transformers` |",
        "|" + "---:|" * (6 + len(ACCEPTED)),
    ]
    for r in records:
        for n, own in r["rounds"].items():
            cells = [f"{own['faster']['dense'][str(a)]:.2f}x" for a in ACCEPTED]
            cells.append(f"{own['faster']['transformers'][str(ACCEPTED[-1])]:.1f}x")
            lines.append(
                f"| {r['context']:,} | {r['ms']['dense']:.0f} ms | {r['ms']['draft']:.0f} ms | "
                f"{n} | "
                f"{own['verification_in_steps']:.1f} | {' | '.join(cells)} |"
            )
    return "\n".join(lines)


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", default="8192,32768,131072")
    parser.add_argument("--seconds", type=float, default=30, help="of turns for each context")
    parser.add_argument("--threads", type=int, help="torch's number of threads")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    models = [llama_1b_two_layers() for _ in range(3)]
    records = []
    for context in [int(part) for part in options.contexts.split(",")]:
        spent = measure(models, context, options.seconds)
        records.append(about_context(context, spent))
        print({k: v for k, v in records[-1].items() if k != "raw_ms"}, flush=True)
    path = report_path(cpu_name(), "lossless_speed.json")
    about = {**environment(), "load_after": load()}
    write(path, {"environment": about, "max_tokens": MAX_TOKENS, "records": records})
    put_table(ROOT / "docs" / "lossless.md", COMMAND, table(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
