"""The interface of a task: so many units a context, each judged for every variant and point."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from ..variants import Point, Variant
from .answering import encode, evaluate


@dataclass(frozen=True)
class Bench:
    """What every unit needs: the model, text that it has not seen, the variants, the settings."""

    model: Any
    tokenizer: Any
    text: bytes
    variants: list[Variant]
    config: Any

    def points(
        self, n_context: int, shares: tuple[float, ...]
    ) -> list[tuple[Variant, list[Point]]]:
        share, window = self.config.share, self.config.window
        return [(v, v.points(shares, n_context, share, window)) for v in self.variants]

    def rng(self, *place: int) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, *place])


class Task(ABC):
    """`name` is its key in `TASKS`; `timed` tasks run alone, when nothing else keeps the cores.

    `budgets`: the field of the settings whose shares it judges methods at, None for no method.
    """

    name: ClassVar[str]
    timed: ClassVar[bool] = False
    budgets: ClassVar[str | None] = "answer_budgets"

    @abstractmethod
    def n_units(self, config) -> int:
        """Texts or prompts at each context."""

    @abstractmethod
    def run_unit(self, bench: Bench, context: int, number: int) -> tuple[list[dict], bytes]:
        """Raw records of the unit, and the text that was judged."""


def text_tokens(tokenizer, text: bytes, length: int, number: int, count: int) -> torch.Tensor:
    """The `number`-th of `count` evenly spread pieces of `length` tokens."""
    n_bytes = length * 8  # a token is at most a few bytes; the rest is cut off
    start = int(number * max(0, len(text) - min(n_bytes, len(text))) / max(1, count - 1))
    tokens = encode(tokenizer, text[start : start + n_bytes])[:length]
    if len(tokens) < length:
        raise ValueError(
            f"the text must have at least {length} tokens for this context; got {len(tokens)}"
        )
    return tokens


def ask(bench: Bench, make, room: int, score, n_tokens: int) -> tuple[list[dict], bytes]:
    """Records of prompts of at most `room` tokens, and their text; `n_tokens` an answer.

    `make(n_bytes)` makes prompts that share a context, `score(prompt, answers)` judges what was
    generated.
    """
    prompts = prompts_of_tokens(make, bench.tokenizer, room, len(bench.text))
    n_context = len(encode(bench.tokenizer, prompts[0].context))
    points = bench.points(n_context, bench.config.answer_budgets)
    records = evaluate(bench.model, bench.tokenizer, prompts, score, points, n_tokens)
    return records, prompts[0].context + b"".join(q for p in prompts for q in p.questions)


def prompts_of_tokens(make, tokenizer, n_tokens: int, most_bytes: int) -> list:
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
