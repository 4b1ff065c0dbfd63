"""Long answers of a pretrained model: how often a sparse step says what a dense one says.

    make models
    python -m benchmarks.agreement [--context 4096] [--prompts 6] [--tokens 256] [--threads 1]

*Text and code* are continued greedily by `transformers`, over its own cache, by `--tokens` tokens.
Then the same tokens are fed to `saap` one by one: at each it is asked which token it would say
next. `same` is the share at which that is the dense one; `parts_at` the first place where it is
not, where the two continuations would part; `--tokens` where there is none.

*Answers*: a document and a question about it in the model's chat template, generated until the
model ends, at most `--tokens`: lengths, dense and sparse. Sparse decoding might make them longer.

JSON goes to `$OUT` or `benchmarks/results/<device>/agreement.json`, the table to
`docs/real_models.md`, both after each prompt, so a run may be stopped at any time.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from saap import hf
from saap.budget import Budget
from saap.eval.corpus import read_corpus
from saap.eval.tasks.answering import encode

from .cpu import cpu_name, environment
from .lossless import KINDS, QUESTIONS, Prompt, piece
from .reports import ROOT, put_table, report_path, write

COMMAND = "python -m benchmarks.agreement"
SPARE = 64  # tokens of a chat template and a question, at most


def continued(prompt: Prompt, shares: list[float]) -> Iterator[dict]:
    """Records of text that dense attention continues, one for each budget."""
    for share in shares:
        with sparse(prompt, share) as (own, cache):
            same = forced(own, cache, prompt)
        parts = [i for i, equal in enumerate(same) if not equal]
        yield {"share": share, "tokens": len(same), "same": sum(same),
               "parts_at": parts[0] if parts else len(same)}  # fmt: skip


@torch.no_grad()
def forced(own, cache, prompt: Prompt) -> list[bool]:
    """Whether it would say each of the dense tokens, after those before it."""
    found, last = [], int(prompt.tokens[-1])
    for token in prompt.transformers.tokens:
        logits = own.model(torch.tensor([[last]]), **hf.over(cache)).logits[0, -1]
        found.append(int(logits.argmax()) == token)
        last = token
    return found


def answered(prompt: Prompt, shares: list[float]) -> Iterator[dict]:
    """Records of answers that the model ends itself, one for each budget."""
    dense = prompt.transformers.tokens
    for share in shares:
        with sparse(prompt, share) as (_, cache):
            found = prompt.generated(cache).tokens
        yield {"share": share, "dense_length": len(dense), "length": len(found),
               "same": found == dense}  # fmt: skip


@contextmanager
def sparse(prompt: Prompt, share: float) -> Iterator[tuple]:
    """The model with `saap` at a share of the rows, and a cache that has read the prompt."""
    n = len(prompt.tokens)
    with hf.attached(prompt.model, method="saap", budget=Budget.for_selectivity(share, n)) as own:
        yield own, hf.cache_from(own, prompt.context, n + prompt.n_new + 1)


def chat(tokenizer, text: bytes, number: int, n: int, context: int) -> Tensor:
    """A document of about so many tokens and a question about it, in the chat template."""
    document = encode(tokenizer, piece(text, number, n, context), special=False)
    content = tokenizer.decode(document[: context - SPARE])
    question = QUESTIONS[number % len(QUESTIONS)]
    turns = [{"role": "user", "content": f"{content}\n\n{question}"}]
    written = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return encode(tokenizer, written.encode(), special=False)


def summary(records: list[dict], n_new: int) -> list[dict]:
    """One entry for each budget."""
    found = []
    for share in sorted({r["share"] for r in records}):
        own = [r for r in records if r["share"] == share]
        told = {"share": share}
        for kind in ("text", "code"):
            part = [r for r in own if r["kind"] == kind]
            if part:
                told[kind] = sum(r["same"] for r in part) / sum(r["tokens"] for r in part)
        ran_on = [r["parts_at"] for r in own if r["kind"] in ("text", "code")]
        if ran_on:
            told |= {"continued": len(ran_on), "parts_at": statistics.median(ran_on),
                     "never": sum(at >= n_new for at in ran_on)}  # fmt: skip
        answers = [r for r in own if r["kind"] == "answer"]
        if answers:
            told |= {
                "answers": len(answers), "same_answers": sum(r["same"] for r in answers),
                "length": statistics.mean(r["length"] for r in answers),
                "dense_length": statistics.mean(r["dense_length"] for r in answers),
            }  # fmt: skip
        found.append(told)
    return found


def table(run: dict) -> str:
    lines = [
        "| budget | same next token, text | code | first other token, median | no other in "
        f"{run['tokens']} | answers of the same words | tokens of an answer, dense | sparse |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for s in summary(run["records"], run["tokens"]):
        lines.append(
            f"| {s['share']:.0%} | {s['text']:.1%} | {s['code']:.1%} | {s['parts_at']:.0f} | "
            f"{s['never']} of {s['continued']} | {s['same_answers']} of {s['answers']} | "
            f"{s['dense_length']:.0f} | {s['length']:.0f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--budgets", default="0.05,0.1", help="shares of the context")
    parser.add_argument("--prompts", type=int, default=6, help="of each kind")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, help="torch's number of threads")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    shares = [float(part) for part in options.budgets.split(",")]
    model, tokenizer = hf.load_model(options.model), hf.load_tokenizer(options.model)
    ends = model.generation_config.eos_token_id
    texts = {name: read_corpus([Path(name)]) for name in sorted(set(KINDS.values()))}
    run = {"model": options.model, "context": options.context, "tokens": options.tokens,
           "environment": environment(), "records": []}  # fmt: skip
    path = report_path(cpu_name(), "agreement.json")
    for number in range(options.prompts):
        for kind, corpus in (("answer", "prose2"), ("text", "prose2"), ("code", "code")):
            place = texts[corpus], number, options.prompts, options.context
            if kind == "answer":
                tokens, records = chat(tokenizer, *place), answered
            else:
                tokens, records = encode(tokenizer, piece(*place))[: options.context], continued
            model.generation_config.eos_token_id = ends if kind == "answer" else None
            prompt = Prompt(model, tokenizer, tokens, options.tokens)
            for record in records(prompt, shares):
                run["records"].append({"prompt": number, "kind": kind, **record})
                print(run["records"][-1], flush=True)
        write(path, run | {"summaries": summary(run["records"], options.tokens)})
        put_table(ROOT / "docs" / "real_models.md", COMMAND, table(run))
    print(table(run))
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
