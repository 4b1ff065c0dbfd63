"""One prompt whose beginning is read densely, while its end and the answer go through a method."""

from collections.abc import Callable

import torch
from torch import Tensor

from saap import hf
from saap.budget import Budget
from saap.decode import SparseDecode
from saap.methods import Method
from saap.prefill import DensePrefill

from .tasks.perplexity import all_logits


class SparseReader:
    """The last `question_tokens` of each prompt and all that follows them are sparse.

    Prompts that sinks, window and question hold whole are read densely to their end but one
    token. The dense part of the latest prompt is kept: choices of one question share it.
    """

    def __init__(self, model, method: Method, budget: Budget, *, question_tokens: int = 64):
        if question_tokens < 1:
            raise ValueError(f"question_tokens={question_tokens}: accepted are 1 and more")
        self.model, self.method, self.budget = model, method, budget
        self.question_tokens = question_tokens
        self._latest: tuple[list[int], DensePrefill] | None = None

    @torch.no_grad()
    def log_likelihood(self, prompt: list[int], answer: list[int]) -> tuple[float, bool]:
        """Nats of `answer` after `prompt`, and whether greedy decoding would say it."""
        rest, decode, start = self._open(prompt, len(answer))
        asked = torch.tensor([*rest, *answer[:-1]])
        logits = all_logits(self.model, asked, decode, start)[len(rest) - 1 :]
        wanted = torch.tensor(answer)
        scores = logits.log_softmax(-1).gather(-1, wanted[:, None])
        return float(scores.sum()), bool((logits.argmax(-1) == wanted).all())

    def generate(
        self, prompt: list[int], most: int, finished: Callable[[list[int]], bool]
    ) -> list[int]:
        """Greedy tokens after `prompt`, at most `most`, until `finished(tokens)`."""
        rest, decode, start = self._open(prompt, most)
        found: list[int] = []
        pending = rest
        while len(found) < most and not finished(found):
            logits = hf.run_chunks(self.model, torch.tensor([pending]), decode, start=start)
            start += len(pending)
            pending = [int(logits[0].argmax())]
            found += pending
        return found

    def _open(self, prompt: list[int], spare: int) -> tuple[list[int], SparseDecode, int]:
        if len(prompt) < 2:
            raise ValueError(f"a prompt of {len(prompt)} tokens: accepted are 2 and more")
        local = self.budget.n_sink + self.budget.window
        split = len(prompt) - self.question_tokens
        if split <= local:
            split = len(prompt) - 1
        prefill = self._prefill(prompt[:split])
        rest = prompt[split:]
        return rest, SparseDecode(prefill, self.method, self.budget, len(rest) + spare), split

    def _prefill(self, tokens: list[int]) -> DensePrefill:
        if self._latest is None or self._latest[0] != tokens:
            prefill = DensePrefill(len(tokens))
            hf.run_chunks(self.model, torch.tensor([tokens]), prefill)
            self._latest = tokens, prefill
        return self._latest[1]


def shortened(tokens: list[int] | Tensor, most: int) -> list[int]:
    """The last `most` tokens: what a model of that context can read."""
    return [int(t) for t in tokens[-most:]] if most > 0 else []
