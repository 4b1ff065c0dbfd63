"""Keys and values stored narrower than the model computes: bytes, time, and what is lost.

    make models
    python -m benchmarks.narrow [--threads 1] [--tokens 131072] [--texts 12] [--keys 24]

Steps of one layer in the shape of SmolLM2's (9 query heads, 3 KV heads of 64) over random vectors;
pass keys of the reference model among eight distractors, at 256 rows; and texts of SmolLM2: 3,840
tokens of Python's manual are read once, then held as each dtype says, and the 256 tokens that
follow are predicted with attention over every row. Figures go to `$OUT`, else to
`benchmarks/results/<device>/narrow.json`, and then into `docs/scale.md`.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

import saap
from saap import Budget, KVStore, hf
from saap.eval import reference
from saap.eval.corpus import read_corpus
from saap.eval.tasks.answering import encode
from saap.eval.tasks.needles import as_lines, draw_names
from saap.eval.tasks.passkey import IN_CODE
from saap.eval.tasks.prompts import hide, random_depths

from .cpu import cpu_name, environment
from .lossless import BYTES_A_TOKEN
from .reports import ROOT, put_table, report_path, write
from .scale import BUDGET, filled, new_store, steps

COMMAND = "python -m benchmarks.narrow"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
READ, PREDICTED = 3840, 256


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def of_steps(tokens: int) -> list[dict]:
    records = []
    for dtype in DTYPES:
        sparse = steps(filled(new_store(kv_dtype=dtype), tokens))
        store = filled(KVStore(None, BUDGET, kv_dtype=dtype), tokens)
        kv = 2 * store.k.shape[1] * store.k.shape[3] * store.k.element_size()
        records.append({"kv_bytes": kv, "sparse_ms": sparse, "dense_ms": steps(store)})
        print(name_of(dtype), records[-1], flush=True)
    return records


@torch.no_grad()
def of_pass_keys(count: int) -> list[dict]:
    """Right answers of the reference model, among eight distractors in 4,096 bytes, by dtype."""
    model, tokenizer = (read(reference.FOLDER) for read in (hf.load_model, hf.load_tokenizer))
    text, rng = reference.split_held_out()[1], np.random.default_rng(0)
    asked = []
    for _ in range(count):
        names = draw_names(rng, 9)
        pairs = [(name, IN_CODE.random_key(rng)) for name in names]
        question = IN_CODE.question(names[0]).encode()
        lines = as_lines(IN_CODE, random_depths(rng, 9), pairs)
        prompt = hide(text, lines, 4096 - len(question), rng) + question
        asked.append((encode(tokenizer, prompt)[None], pairs[0][1]))
    records = []
    for dtype in DTYPES:
        right = 0
        for prompt, key in asked:
            with saap.attached(model, budget=Budget(max_tokens=256), kv_dtype=dtype) as attached:
                found = model.generate(
                    prompt, **hf.over(attached.cache()), max_new_tokens=8, do_sample=False
                )
            right += key in tokenizer.decode(found[0, prompt.shape[1] :])
        records.append({"right": right, "asked": count})
        print(name_of(dtype), records[-1], flush=True)
    return records


@torch.no_grad()
def of_texts(count: int) -> list[dict]:
    """Nats of the next token beyond those over float32: the mean of the texts and its error."""
    model, tokenizer = (read("smollm2") for read in (hf.load_model, hf.load_tokenizer))
    text = read_corpus([Path("prose2")])
    nats = []
    for number in range(count):
        start = (2 * number + 1) * len(text) // (2 * count)
        tokens = encode(tokenizer, text[start : start + BYTES_A_TOKEN * (READ + PREDICTED)])
        context = hf.read_context(model, tokens[:READ])
        nats.append([])
        for dtype in DTYPES:
            with hf.attached(model, method="dense", budget=BUDGET, kv_dtype=dtype) as attached:
                cache = hf.cache_from(attached, context, READ + PREDICTED)
                asked = tokens[READ : READ + PREDICTED]
                logits = model(asked[None, :-1], **hf.over(cache)).logits[0]
            nats[-1].append(float(torch.nn.functional.cross_entropy(logits, asked[1:])))
        print(number, nats[-1], flush=True)
    beyond = torch.tensor(nats)
    beyond -= beyond[:, :1].clone()
    error = beyond.std(0) / count**0.5
    return [
        {"nats": float(m), "error": float(e)} for m, e in zip(beyond.mean(0), error, strict=True)
    ]


def table(report: dict) -> str:
    lines = [
        "| `kv_dtype` | bytes of a token | every row, ms | 4,096 rows, ms | keys | nats lost |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for r in report["records"]:
        lost = "–" if r["dtype"] == "float32" else f"{r['nats']:z.4f} ± {r['error']:.4f}"
        lines.append(
            f"| {r['dtype']} | {r['kv_bytes']:,} | {r['dense_ms']:.1f} | {r['sparse_ms']:.1f} "
            f"| {r['right']} of {r['asked']} | {lost} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--texts", type=int, default=12, help="of SmolLM2")
    parser.add_argument("--keys", type=int, default=24, help="pass keys to ask for")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = {"environment": environment(), "threads": options.threads, "tokens": options.tokens}
    parts = of_steps(options.tokens), of_pass_keys(options.keys), of_texts(options.texts)
    report["texts"] = options.texts
    report["records"] = [
        {"dtype": name_of(dtype), **one, **two, **three}
        for dtype, one, two, three in zip(DTYPES, *parts, strict=True)
    ]
    write(report_path(cpu_name(), "narrow.json"), report)
    put_table(ROOT / "docs" / "scale.md", COMMAND, table(report))
    print(table(report))


if __name__ == "__main__":
    main()
