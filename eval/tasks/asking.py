"""Prompts of a task, made as long as the context, asked and judged."""

from .answering import encode, evaluate
from .base import Bench, Prompt
from .chat import ChatTemplate


def ask(bench: Bench, make, room: int, score, n_tokens: int) -> tuple[list[dict], bytes]:
    """Records of prompts of at most `room` tokens, and their text; `n_tokens` an answer.

    `make(n_bytes)` makes prompts that share a context, `score(prompt, answers)` judges what was
    generated.
    """
    tokenizer = bench.tokenizer
    template = ChatTemplate.of(tokenizer) if bench.config.chat else None
    make = make if template is None else template.around_all(make)
    prompts = prompts_of_tokens(make, tokenizer, room, len(bench.text))
    n_context = len(encode(tokenizer, prompts[0].context))
    points = bench.points(n_context, bench.config.answer_budgets)
    stop = None if template is None else template.end_of_turn(tokenizer)
    records = evaluate(bench.model, tokenizer, prompts, score, points, n_tokens, stop)
    return records, prompts[0].context + b"".join(q for p in prompts for q in p.questions)


def prompts_of_tokens(make, tokenizer, n_tokens: int, most_bytes: int) -> list[Prompt]:
    """`make(n_bytes)` so long that none has more than `n_tokens` tokens, and all nearly as many.

    A token is a byte for some tokenizers and several for others; text is not equally dense.
    """
    n_bytes = n_tokens
    prompts = make(n_bytes)
    for _ in range(6):
        longest = max(prompts, key=lambda p: len(p.text))
        found = len(encode(tokenizer, longest.text, special=False))
        if 0.98 * n_tokens <= found <= n_tokens or (found < n_tokens and n_bytes == most_bytes):
            break
        n_bytes = min(most_bytes, int(n_bytes * 0.99 * n_tokens / found))
        prompts = make(n_bytes)
    return prompts
