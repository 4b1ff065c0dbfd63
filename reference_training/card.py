"""Measure the reference model and write its card: `python -m reference_training.card`.

Every figure of `files/README.md` comes from here, on text that training never saw.
"""

import json
from pathlib import Path

import numpy as np
import torch

from saap import hf
from saap.budget import Budget
from saap.eval.decoding import decoder
from saap.eval.reference import FOLDER, split_held_out
from saap.eval.tasks import passkey
from saap.eval.tasks.answering import encode
from saap.methods import find_method

N_TEXTS, N_PROMPTS, N_SINK = 16, 50, 16
LENGTHS = (1024, 2048, 4096, 8192)
CONTEXT = LENGTHS[-1]  # what a CPU measures; `judge` goes to the model's longest


@torch.no_grad()
def loss_by_position(model, texts: list[torch.Tensor]) -> np.ndarray:
    """Bits per byte in each eighth of the context, and over all of it: `[9]`."""
    losses = []
    for tokens in texts:
        logits = model(tokens[None, :-1], use_cache=False).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none"))
    mean = torch.stack(losses).mean(0) / np.log(2)
    eighths = [float(part.mean()) for part in mean.chunk(8)]
    return np.array([*eighths, float(mean.mean())])


def attention_shares(model, texts: list[torch.Tensor], n_queries: int = 256) -> np.ndarray:
    """Mean share of attention on sinks, middle and window, `[layer, query head, 3]`, of the last
    queries of each text."""
    totals = 0.0
    for tokens in texts:
        read = hf.read_context(model, tokens, n_queries=n_queries)
        n, window = len(tokens), len(tokens) // 32
        places = torch.arange(n - n_queries, n)[:, None]
        columns = torch.arange(n)
        rows = []
        for layer in (own.info for own in hf.model_layers(model)):
            q, k = read.queries[layer.number][0], read.keys(layer.number)[0][0]
            k = k.repeat_interleave(q.shape[1] // len(k), 0)
            scores = torch.einsum("nhd,hmd->hnm", q, k) * layer.sm_scale
            weights = scores.masked_fill(columns > places, -torch.inf).softmax(-1)
            sinks = weights[..., :N_SINK].sum(-1).mean(-1)
            recent = (weights * (columns > places - window)).sum(-1).mean(-1)
            rows.append(torch.stack([sinks, 1 - sinks - recent, recent], -1))
        totals = totals + torch.stack(rows).numpy()
    return totals / len(texts)


def pass_key_accuracy(model, tokenizer, text: bytes, length: int, n_prompts: int) -> float:
    """Dense greedy answers, all seven digits right, among 8 distractors, depths spread evenly."""
    rng = np.random.default_rng([7, length])
    right = 0
    dense, any_budget = find_method("dense")(), Budget(max_tokens=1)
    for number in range(n_prompts):
        depth = (number + 0.5) / n_prompts * 0.95
        prompt = passkey.make_prompt(text, length - 16, rng, depth=depth)
        context = encode(tokenizer, prompt.context)
        read = hf.read_context(model, context)
        question = encode(tokenizer, prompt.question, special=False)
        spare = len(question) + passkey.KEY_DIGITS
        with decoder(model, read, dense, any_budget, spare) as own:
            generated = own.greedy(question, passkey.KEY_DIGITS)
        right += passkey.is_right(prompt, tokenizer.decode(generated).encode())
    return right / n_prompts


def measure(folder: Path) -> dict:
    model, tokenizer = hf.load_model(folder), hf.load_tokenizer(folder)
    text = b"".join(split_held_out())
    step = (len(text) - 2 * CONTEXT) // N_TEXTS
    texts = [
        encode(tokenizer, text[i * step : i * step + CONTEXT + 64])[: CONTEXT + 1]
        for i in range(N_TEXTS)
    ]
    bits = loss_by_position(model, texts)
    print("bits per byte", bits.round(3), flush=True)
    shares = attention_shares(model, [t[:CONTEXT] for t in texts[::4]])
    accuracy = {}
    for length in LENGTHS:
        accuracy[length] = pass_key_accuracy(model, tokenizer, text, length, N_PROMPTS)
        print(f"pass key at {length}: {accuracy[length]:.2f}", flush=True)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bits_per_byte_by_eighth": bits[:8].round(4).tolist(),
        "bits_per_byte": round(float(bits[8]), 4),
        "pass_key_accuracy": accuracy,
        "prompts": N_PROMPTS,
        "attention_shares": shares.round(4).tolist(),
    }


def shares(mix: dict[str, float]) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {share:.0%}" for name, share in mix.items() if share
    )


def text_trained_on(corpus: dict | None) -> str:
    """`corpus`: what the training wrote to `corpus.json`."""
    if corpus is None:
        return "Python standard-library sources (PSF licence)"
    named = (f"{s['name']} {s['version']} ({s['licence']})" for s in corpus["sources"])
    return f"{corpus['bytes'] / 1e6:.0f} MB of sources and docs of {'; '.join(named)}"


def long_figures(judged: dict | None) -> str:
    """Tables of what `judge` measured; nothing where it did not run."""
    if judged is None:
        return ""
    bits = judged["bits_per_byte_by_eighth"]
    rows = [f"| {int(n):,} | {' | '.join(f'{b:.3f}' for b in row)} |" for n, row in bits.items()]
    head = f"| length | {' | '.join(map(str, range(1, 9)))} |\n|{'---|' * 9}"
    answers = [
        f"| {name} ({judged['prompts'][name]}) | "
        + " | ".join(f"{share:.0%}" for share in found.values())
        + " |"
        for name, found in judged["accuracy"].items()
    ]
    lengths = " | ".join(f"{int(n):,}" for n in bits)
    return "\n".join(
        [
            "\n## Measured at all lengths (`python -m reference_training.judge`)\n",
            "Bits per byte by eighth of the context:\n",
            head,
            *rows,
            "\nDense answers without an error (prompts a length), pass keys among 16 others:\n",
            f"| task | {lengths} |\n|{'---|' * (len(bits) + 1)}",
            *answers,
            "",
        ]
    )


def render(
    card: dict,
    recipe: dict,
    log: list[dict],
    corpus: dict | None = None,
    judged: dict | None = None,
    plan: dict | None = None,
) -> str:
    decoder = recipe["decoder"]
    stages = "\n".join(
        f"| {s['length']:,} | {s['batch']} | {s['steps']:,} | {shares(s['mix'])} | "
        f"{s['jump']:.0%} |"
        for s in recipe["stages"]
    )
    keys = "\n".join(f"| {int(n):,} | {a:.0%} |" for n, a in card["pass_key_accuracy"].items())
    device = "2 shared CPU cores" if plan is None else f"one {plan['device']}"
    bits = " | ".join(f"{b:.3f}" for b in card["bits_per_byte_by_eighth"])
    heads = "\n".join(
        f"| {layer} | {head} | {sink:.1%} | {middle:.1%} | {recent:.1%} |"
        for layer, row in enumerate(card["attention_shares"])
        for head, (sink, middle, recent) in enumerate(row)
    )
    return f"""---
license: apache-2.0
library_name: transformers
---

# saap reference model

A byte-level Llama of {card["parameters"] / 1e6:.2f} M parameters, really trained at the lengths at
which it is used: {decoder["num_hidden_layers"]} layers, hidden {decoder["hidden_size"]},
{decoder["num_attention_heads"]} query and {decoder["num_key_value_heads"]} KV heads of
{decoder["head_dim"]}, RoPE base {decoder["rope_theta"]:.0e}, tied embeddings, contexts to
{decoder["max_position_embeddings"]:,}. A token is a byte; `<bos>` (256) stands first.

It exists to judge attention methods on: it is no assistant. This card is written by
`python -m reference_training.card`; the model by `python -m reference_training.train`
({log[-1]["step"]:,} steps, {log[-1]["seconds"] / 60:.0f} minutes on {device}).

## Training

{text_trained_on(corpus)}, files split by the hash of their path; one in 20 is
held out, and a part of those is shipped as `held_out.txt.xz` (never trained on). Mixed in: what
`saap.eval.reference.sequences` makes.

| length | batch | steps | shares of the batch | positions with gaps |
|---|---|---|---|---|
{stages}

## Measured, on held-out text

Bits per byte at {CONTEXT:,}: **{card["bits_per_byte"]:.3f}**; by eighth of the context:

| 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 |
|---|---|---|---|---|---|---|---|
| {bits} |

A named pass key among 8 distractors in source text, all 7 digits, greedy, dense
({card["prompts"]} prompts a length):

| length | right |
|---|---|
{keys}

Share of attention at {CONTEXT:,} on the first {N_SINK} tokens, the middle, and the window of
{CONTEXT // 32}:

| layer | head | sinks | middle | window |
|---|---|---|---|---|
{heads}
{long_figures(judged)}"""


def main() -> None:
    card = measure(FOLDER)
    (FOLDER / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    recipe = json.loads((FOLDER / "recipe.json").read_text())
    log = [json.loads(line) for line in (FOLDER / "training_log.jsonl").read_text().splitlines()]
    found = [
        json.loads(path.read_text()) if path.is_file() else None
        for path in (FOLDER / f"{name}.json" for name in ("corpus", "judged", "plan"))
    ]
    (FOLDER / "README.md").write_text(render(card, recipe, log, *found))


if __name__ == "__main__":
    main()
