"""One prompt whose beginning is read densely, while its end and the answer go through a method."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from saap import hf
from saap.budget import Budget
from saap.methods import Method

from .decoding import Decoder, decoder


class SparseReader:
    """The last `question_tokens` of each prompt and all that follows them are sparse.

    Prompts that sinks, window and question hold whole are read densely to their end but one
    token. The dense part of the latest prompt is kept: choices of one question share it.
    """

    def __init__(self, model, method: Method, budget: Budget, *, question_tokens: int = 64):
        if question_tokens < 1:
            raise ValueError(f"question_tokens must be at least 1; got {question_tokens}")
        self.model, self.method, self.budget = model, method, budget
        self.question_tokens = question_tokens
        self._latest: tuple[list[int], hf.ReadContext] | None = None

    @torch.no_grad()
    def log_likelihood(self, prompt: list[int], answer: list[int]) -> tuple[float, bool]:
        """Nats of `answer` after `prompt`, and whether greedy decoding would say it."""
        with self._open(prompt, len(answer)) as (rest, own):
            logits = own.logits([*rest, *answer[:-1]])[len(rest) - 1 :]
        wanted = torch.tensor(answer)
        scores = logits.log_softmax(-1).gather(-1, wanted[:, None])
        return float(scores.sum()), bool((logits.argmax(-1) == wanted).all())

    def generate(
        self, prompt: list[int], most: int, finished: Callable[[list[int]], bool]
    ) -> list[int]:
        """Greedy tokens after `prompt`, at most `most`, until `finished(tokens)`."""
        found: list[int] = []
        with self._open(prompt, most) as (pending, own):
            while len(found) < most and not finished(found):
                pending = own.greedy(pending, 1)
                found += pending
        return found

    @contextlib.contextmanager
    def _open(self, prompt: list[int], spare: int) -> Iterator[tuple[list[int], Decoder]]:
        if len(prompt) < 2:
            raise ValueError(f"a prompt must have at least 2 tokens; got {len(prompt)}")
        local = self.budget.n_sink + self.budget.window
        split = len(prompt) - self.question_tokens
        if split <= local:
            split = len(prompt) - 1
        rest, context = prompt[split:], self._read(prompt[:split])
        with decoder(self.model, context, self.method, self.budget, len(rest) + spare) as own:
            yield rest, own

    def _read(self, tokens: list[int]) -> hf.ReadContext:
        if self._latest is None or self._latest[0] != tokens:
            self._latest = tokens, hf.read_context(self.model, torch.tensor(tokens))
        return self._latest[1]


def shortened(tokens: list[int] | Tensor, most: int) -> list[int]:
    """The last `most` tokens: what a model of that context can read."""
    return [int(t) for t in tokens[-most:]] if most > 0 else []
