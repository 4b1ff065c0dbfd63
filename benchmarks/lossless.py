"""Lossless decoding of a pretrained model: how many tokens a verification accepts, how fast it is.

    make models
    python -m benchmarks.lossless [--contexts 2048] [--prompts 12] [--tokens 32] [--threads 1]

Prompts are, in turn, text (Python's documentation), code (its standard library), and text with a
question behind it. Each is read once, densely; then continued greedily, one after the other,

- by `transformers`: the model's own attention over its `DynamicCache`;
- by `dense`: ours over the same store, every row visited;
- at each budget by `saap` drafting: with a fixed number of drafts, which counts what verifications
  accept, and where `--ways fixed,adapting` asks for it adapting, which is what users run.

Rates are of the tokens after the first. What selectors learn from a prompt happens before that and
is told apart (`learn_s`). `same`: all tokens are those of `transformers`; else `parts_at`, the
first place where they are not, and `gap`, by how much its likeliest token leads the next one
there, in nats: rounding may turn a tie. JSON goes to `$OUT` or
`benchmarks/results/<device>/lossless.json`, the table to `docs/lossless.md`, both after each
prompt, so a run may be stopped at any time. Runs of other models and contexts that are there stay.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from saap import hf
from saap.budget import Budget
from saap.eval.corpus import read_corpus
from saap.eval.tasks.answering import encode
from saap.hf import Verify
from saap.hf.reading import DENSE
from saap.hf.text import Generated, generate_text

from .cpu import cpu_name, environment
from .cpu_timing import load
from .reports import ROOT, put_table, report_path, write

KINDS = {"text": "prose2", "code": "code", "question": "prose2"}
QUESTIONS = (
    "What is the text above about?",
    "Which functions does the text above name, and what do they do?",
    "What should a beginner remember of the text above?",
)
COMMAND = "python -m benchmarks.lossless"
WAYS = {"fixed": False, "adapting": True}  # whether the number of drafts adapts
N_SINK, WINDOW = 4, 16  # small, so that 2 % of 2,048 tokens are more than they
BYTES_A_TOKEN = 8


def piece(text: bytes, number: int, n: int, context: int) -> bytes:
    """Text for so many tokens, from one of `n` places that are spread over the whole."""
    start = (2 * number + 1) * len(text) // (2 * n)
    return text[start : start + BYTES_A_TOKEN * context]


def prompts(
    tokenizer, texts: dict[str, bytes], context: int, n: int
) -> Iterator[tuple[str, Tensor]]:
    """The kind and `tokens [context]` of each prompt, from places spread over the corpora."""
    for number in range(n):
        kind = list(KINDS)[number % len(KINDS)]
        tokens = encode(tokenizer, piece(texts[KINDS[kind]], number, n, context))
        if len(tokens) < context:
            raise ValueError(f"{KINDS[kind]} must have {context} tokens; got {len(tokens)}")
        asked = tokens[:0]
        if kind == "question":
            question = QUESTIONS[number // len(KINDS) % len(QUESTIONS)]
            asked = encode(tokenizer, f"\n\nQuestion: {question}\nAnswer:".encode(), special=False)
        yield kind, torch.cat([tokens[: context - len(asked)], asked])


def budgets(shares: list[float], context: int) -> dict[float, Budget]:
    places = {"n_sink": N_SINK, "window": WINDOW}
    return {s: Budget.for_selectivity(s, context, **places) for s in shares}


class Prompt:
    """One prompt, read once, and what `transformers` says to it."""

    def __init__(self, model, tokenizer, tokens: Tensor, n_new: int):
        self.model, self.tokenizer, self.tokens, self.n_new = model, tokenizer, tokens, n_new
        self.context = hf.read_context(model, tokens[:-1])
        self.transformers = self.generated(hf.dynamic_cache_from(model, self.context))

    def generated(self, cache) -> Generated:
        return generate_text(self.model, self.tokenizer, self.tokens, self.n_new, cache=cache)

    def record(self, method: str, budget: Budget, verify: Verify | None) -> dict:
        """One continuation over our store."""
        with hf.attached(self.model, method=method, budget=budget, verify=verify) as own:
            cache = hf.cache_from(own, self.context, len(self.tokens) + self.n_new + 64)
            begin = time.perf_counter()
            for layer in cache.saap_layers:
                layer.store.chooses()
            learned = time.perf_counter() - begin
            found = self.generated(cache)
            tally = None if cache.pace is None else cache.pace.tally
        told = {"tokens_per_s": found.tokens_per_second, "learn_s": learned}
        told |= self.compared(found.tokens)
        if tally is not None:
            told |= {
                "per_verification": tally.accepted_per_verification,
                "acceptance": tally.acceptance,
                **vars(tally),
            }
        return told

    def compared(self, tokens: list[int]) -> dict:
        expected = self.transformers.tokens
        if tokens == expected:
            return {"same": True}
        at = next(i for i, (a, b) in enumerate(zip(tokens, expected, strict=False)) if a != b)
        ids = torch.cat([self.tokens, torch.tensor(expected[:at], dtype=torch.long)])
        with torch.no_grad():
            logits = self.model(ids[None], use_cache=False, logits_to_keep=1).logits[0, -1]
        first, second = logits.float().log_softmax(-1).topk(2).values.tolist()
        return {"same": False, "parts_at": at, "gap": first - second}


def measure(prompt: Prompt, shares: list[float], drafts: int, ways: list[str]) -> Iterator[dict]:
    """Records of one prompt: dense first, then each budget."""
    yield {"way": "transformers", "tokens_per_s": prompt.transformers.tokens_per_second}
    yield {"way": "dense", **prompt.record("dense", DENSE, None)}
    for share, budget in budgets(shares, len(prompt.tokens)).items():
        for way in ways:
            own = prompt.record("saap", budget, Verify(drafts, adapt=WAYS[way]))
            yield {"way": way, "share": share, **own}


def summaries(records: list[dict]) -> list[dict]:
    """Over prompts of a context, for each way and budget; rates as medians of ratios."""
    found = []
    keys = sorted({(r["way"], r.get("share", 1.0)) for r in records})
    base = {(r["prompt"], r["way"]): r["tokens_per_s"] for r in records if "share" not in r}
    for way, share in keys:
        own = [r for r in records if (r["way"], r.get("share", 1.0)) == (way, share)]
        told = {"way": way, "share": share, "prompts": len(own)}
        told["tokens_per_s"] = statistics.median(r["tokens_per_s"] for r in own)
        for other in ("dense", "transformers"):
            told[f"to_{other}"] = statistics.median(
                r["tokens_per_s"] / base[r["prompt"], other] for r in own
            )
        if "same" in own[0]:
            told["same"] = sum(r["same"] for r in own)
        if "verifications" in own[0]:
            done = sum(r["verifications"] for r in own)
            told["per_verification"] = 1 + sum(r["accepted"] for r in own) / max(1, done)
            told["acceptance"] = sum(r["accepted"] for r in own) / max(
                1, sum(r["drafted"] for r in own)
            )
            told["exact_steps"] = sum(r["exact_steps"] for r in own)
        found.append(told)
    return found


def print_summary(s: dict) -> None:
    line = s["way"]
    if s["way"] in ("fixed", "adapting"):
        line += (
            f", {s['share']:.0%}: {s['per_verification']:.2f} tokens per verification, "
            f"{s['acceptance']:.0%} of drafts accepted, {s['exact_steps']} exact steps,"
        )
    same = f", same tokens {s['same']} of {s['prompts']}" if "same" in s else ""
    print(
        f"{line} {s['tokens_per_s']:.2f} tokens/s, {s['to_dense']:.2f}x dense, "
        f"{s['to_transformers']:.2f}x transformers{same}",
        flush=True,
    )


def table(runs: list[dict]) -> str:
    """What verifications accept with a fixed number of drafts, for a page of the docs."""
    lines = [
        "| model | context | budget | text | code | question | all | same tokens |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for run in sorted(runs, key=lambda run: (run["model"] != "smollm2", run["context"])):
        fixed = [r for r in run["records"] if r["way"] == "fixed"]
        for share in sorted({r["share"] for r in fixed}):
            own = [r for r in fixed if r["share"] == share]
            parts = [per_verification([r for r in own if r["kind"] == kind]) for kind in KINDS]
            same = sum(r["same"] for r in own)
            lines.append(
                f"| {run['model']} | {run['context']:,} | {share:.0%} | {' | '.join(parts)} | "
                f"{per_verification(own)} | {same} of {len(own)} |"
            )
    return "\n".join(lines)


def per_verification(records: list[dict]) -> str:
    done = sum(r["verifications"] for r in records)
    return f"{1 + sum(r['accepted'] for r in records) / done:.2f}" if done else "–"


def put(path: Path, run: dict) -> None:
    """Write a run beside those of other models and contexts, and the page's table of all."""
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    own = run["model"], run["context"]
    runs = [other for other in runs if (other["model"], other["context"]) != own] + [run]
    write(path, {"runs": runs})
    put_table(ROOT / "docs" / "lossless.md", COMMAND, table(runs))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--contexts", default="2048")
    parser.add_argument("--budgets", default="0.02,0.05,0.1,0.2", help="shares of the context")
    parser.add_argument("--prompts", type=int, default=12, help="of each context")
    parser.add_argument("--tokens", type=int, default=32, help="generated for each prompt")
    parser.add_argument("--drafts", type=int, default=8)
    parser.add_argument("--ways", default="fixed", help="of fixed and adapting, by commas")
    parser.add_argument("--threads", type=int, help="torch's number of threads")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    shares = [float(part) for part in options.budgets.split(",")]
    model, tokenizer = hf.load_model(options.model), hf.load_tokenizer(options.model)
    model.generation_config.eos_token_id = None  # as many tokens of every prompt
    texts = {name: read_corpus([Path(name)]) for name in sorted(set(KINDS.values()))}
    path = report_path(cpu_name(), "lossless.json")
    for context in [int(part) for part in options.contexts.split(",")]:
        run = {
            "model": options.model,
            "context": context,
            "environment": environment(),
            "options": {"tokens": options.tokens, "drafts": options.drafts, "n_sink": N_SINK,
                        "window": WINDOW},
            "records": [],
        }  # fmt: skip
        chosen = prompts(tokenizer, texts, context, options.prompts)
        for number, (kind, tokens) in enumerate(chosen):
            prompt = Prompt(model, tokenizer, tokens, options.tokens)
            for record in measure(prompt, shares, options.drafts, options.ways.split(",")):
                run["records"].append({"prompt": number, "kind": kind, **record})
                print(run["records"][-1], flush=True)
            run["environment"]["load_after"] = load()
            run["summaries"] = summaries(run["records"])
            put(path, run)
        print(f"{options.model}, {context:,} tokens")
        for summary in run["summaries"]:
            print_summary(summary)
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
