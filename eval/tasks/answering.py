"""Task accuracy: the context is prefilled densely, the rest goes through the method."""

import torch
from torch import Tensor

from saap import hf
from saap.budget import Budget
from saap.decode import SparseDecode
from saap.methods import Method
from saap.prefill import DensePrefill


def greedy_answer(
    model, prefill: DensePrefill, question: Tensor, method: Method, budget: Budget, n_tokens: int
) -> tuple[list[int], SparseDecode]:
    """Generate `n_tokens` greedily after `question [T]`; `prefill` is left as it was."""
    context = next(iter(prefill.caches.values())).length
    decode = SparseDecode(prefill, method, budget, spare=len(question) + n_tokens)
    logits = hf.run_chunks(model, question[None], decode, start=context)
    generated = []
    for step in range(n_tokens):
        generated.append(int(logits[0].argmax()))
        if step < n_tokens - 1:
            place = context + len(question) + step
            logits = hf.run_chunks(model, torch.tensor([[generated[-1]]]), decode, start=place)
    return generated, decode


def evaluate(
    model,
    tokenizer,
    prompt,
    is_right,
    methods: dict[str, Method],
    budgets: dict[str, Budget],
    n_tokens: int,
) -> list[dict]:
    """One record a method and budget. `prompt` has `context` and `question` as bytes.

    `is_right(prompt, generated_bytes)` judges.
    """
    context = encode(tokenizer, prompt.context)
    question = encode(tokenizer, prompt.question, special=False)
    prefill = DensePrefill(len(context))
    hf.run_chunks(model, context[None], prefill)
    records = []
    for name, method in methods.items():
        for label, budget in budgets.items():
            generated, decode = greedy_answer(model, prefill, question, method, budget, n_tokens)
            visited = decode.visited
            text = tokenizer.decode(generated, skip_special_tokens=True).encode()
            records.append(
                {
                    "method": name,
                    "budget": label,
                    "accuracy": float(is_right(prompt, text)),
                    "selectivity": visited.selectivity,
                    "bytes_read": visited.nbytes / visited.steps,
                    "router_bytes": sum(d.selector.nbytes for d in decode.layers.values())
                    / len(decode.layers),
                    "depth": round(prompt.depth, 3),
                    "generated": text.decode(errors="replace"),
                }
            )
    return records


def encode(tokenizer, text: bytes, *, special: bool = True) -> Tensor:
    ids = tokenizer(text.decode("utf-8", errors="ignore"), add_special_tokens=special)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)
