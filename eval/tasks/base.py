"""The interface of a task: so many units a context, each judged for every variant and point."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from ..variants import Point, Variant
from .answering import encode


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


@dataclass(frozen=True)
class Prompt:
    """`answers[i]` are the strings that what follows `questions[i]` has to contain."""

    context: bytes
    questions: tuple[bytes, ...]
    answers: tuple[tuple[str, ...], ...]
    depth: float | None

    @property
    def question(self) -> bytes:
        """The first one."""
        return self.questions[0]

    @property
    def answer(self) -> str:
        """The first one to the first question."""
        return self.answers[0][0]

    @property
    def text(self) -> bytes:
        return self.context + b"".join(self.questions)


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

    def context_rows(self, config, context: int) -> int:
        """How many of so many tokens are the context that methods search; the others ask."""
        return context

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
