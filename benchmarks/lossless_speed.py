"""What a round of drafts and its verification cost, 8k to 128k tokens, over dense steps.

    python -m benchmarks.lossless_speed [--contexts 8192,32768,131072] [--threads 2]

Random weights of Llama-3.2-1B's shape, cut to two layers, over caches of random rows: drafts of
such a model say nothing, so how many are accepted is taken from `benchmarks.lossless` on
pretrained models. A round drafts 8 tokens with `saap`, forgets them, verifies them and the token
before in one forward over every row, and forgets what was not accepted. Rounds, dense steps over
our own store, and steps of `transformers` take turns. JSON goes to `$OUT` or
`benchmarks/results/<device>/lossless_speed.json`, the table to `docs/lossless.md`.
"""

import argparse
import statistics
import sys

import torch
from transformers import DynamicCache

import saap
from saap import hf
from saap.budget import Budget
from saap.hf.reading import DENSE

from .cpu import cpu_name, environment
from .cpu_timing import load, paired_ratio, take_turns
from .decode import filled, llama_1b_two_layers
from .reports import ROOT, put_table, report_path, write

COMMAND = "python -m benchmarks.lossless_speed"
DRAFTS, MAX_TOKENS = 8, 4096
GIVEN = (6.0, 7.5)
"""Tokens that a round gives: what `benchmarks.lossless` finds lies between these."""


def measure(models: list, context: int, seconds: float) -> dict:
    """Milliseconds of each way in each round of turns. A block has a model of its own."""
    plain_model, dense_model, own_model = models
    about = hf.describe(plain_model)
    shape = (1, about["num_kv_heads"], context, about["head_dim"])
    layers = [torch.randn(2, *shape) for _ in range(about["num_layers"])]
    plain = DynamicCache(config=plain_model.config)
    for number, (k, v) in enumerate(layers):
        plain.update(k, v, number)
    token, drafted = torch.tensor([[5]]), torch.full((1, DRAFTS + 1), 5)
    with (
        saap.attached(dense_model, budget=DENSE, method="dense") as dense_block,
        saap.attached(own_model, budget=Budget(max_tokens=MAX_TOKENS)) as own_block,
    ):
        dense = filled(dense_block, layers, context)
        own = filled(own_block, layers, context)

        def draft():
            with own.drafting():
                for _ in range(DRAFTS):
                    own_model(token, past_key_values=own)

        def verify():
            own_model(drafted, past_key_values=own)
            own.crop(-DRAFTS - 1)

        turns = {
            "drafts": [draft],
            "verification": [verify],
            "dense": [lambda: dense_model(token, past_key_values=dense)] * 4,
            "transformers": [lambda: plain_model(token, past_key_values=plain)],
        }
        return take_turns(turns, seconds)


def about_context(context: int, spent: dict) -> dict:
    rounds = [a + b for a, b in zip(spent["drafts"], spent["verification"], strict=True)]
    times = {
        name: [ms / one for ms, one in zip(spent[name], rounds, strict=True)]
        for name in ("dense", "transformers")
    }
    return {
        "context": context,
        "ms": {name: statistics.median(ms) for name, ms in spent.items()},
        "verification_in_steps": paired_ratio(spent["verification"], spent["dense"]),
        "faster": {
            name: {str(n): n * statistics.median(each) for n in GIVEN}
            for name, each in times.items()
        },
        "raw_ms": spent,
    }


def table(records: list[dict]) -> str:
    dense = " | ".join(f"{n:g} tokens, over dense" for n in GIVEN)
    lines = [
        "| context | dense step | 8 drafts | verification | in dense steps | "
        f"{dense} | {GIVEN[-1]:g}, over `transformers` |",
        "|" + "---:|" * (6 + len(GIVEN)),
    ]
    for r in records:
        ms, faster = r["ms"], r["faster"]
        cells = [f"{faster['dense'][str(n)]:.2f}x" for n in GIVEN]
        cells.append(f"{faster['transformers'][str(GIVEN[-1])]:.1f}x")
        lines.append(
            f"| {r['context']:,} | {ms['dense']:.0f} ms | {ms['drafts']:.0f} ms | "
            f"{ms['verification']:.0f} ms | {r['verification_in_steps']:.1f} | "
            f"{' | '.join(cells)} |"
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
