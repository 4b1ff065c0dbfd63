"""Tasks that ask about something in a long prompt; score is the share of the answers found.

RULER (Hsieh et al., arXiv 2404.06654) names the families and the score (`string_match_all`); the
generators are our own. Lengths are in tokens of the model at hand. The context is dense, question
and answer are sparse.
"""

from abc import abstractmethod

import numpy as np

from .answering import encode
from .asking import ask
from .base import Bench, Prompt, Task
from .passkey import IN_CODE, Wording, insert_lines, wording_of

DEEPEST = 0.95


def share_found(prompt: Prompt, generated: list[bytes]) -> float:
    """RULER's `string_match_all`, without regard to case."""
    found = [
        answer.lower() in text.decode(errors="replace").lower()
        for text, wanted in zip(generated, prompt.answers, strict=True)
        for answer in wanted
    ]
    return float(np.mean(found))


class PromptTask(Task):
    """Subclasses make prompts; `slack` tokens are left for the line ends of an answer."""

    slack = 2
    wording: Wording = IN_CODE
    """How pass keys are stated, for the tokenizer of the model that is judged."""

    def n_units(self, config):
        return config.n_prompts

    @abstractmethod
    def make(
        self,
        haystack: bytes,
        n_bytes: int,
        rng: np.random.Generator,
        depth: float,
        n_questions: int = 1,
    ) -> list[Prompt]:
        """Prompts of at most `n_bytes` bytes, and nearly as many, that share a context.

        One, or as many as `n_questions` where others can be asked about the same context.
        """

    def score(self, prompt: Prompt, generated: list[bytes]) -> float:
        return share_found(prompt, generated)

    def run_unit(self, bench: Bench, context, number):
        self.wording = wording_of(bench.tokenizer, bench.config.chat)
        # Depths are spread evenly over the prompts, so that every run covers beginning to end.
        depth = (number + 0.5) / bench.config.n_prompts * DEEPEST

        def make(n_bytes):
            # The same draws at every length that is tried.
            rng = bench.rng(context, number, sum(self.name.encode()))
            return self.make(bench.text, n_bytes, rng, depth, bench.config.n_questions)

        prompts = make(context)
        wanted = prompts[0].answers
        lengths = [
            len(encode(bench.tokenizer, ", ".join(w).encode(), special=False))
            for p in prompts
            for w in p.answers
        ]
        n_tokens = max(lengths) + self.slack + self.wording.lead_tokens
        return ask(bench, make, context - len(wanted) * n_tokens - 8, self.score, n_tokens)


def hide(
    haystack: bytes, lines: list[tuple[float, bytes]], room: int, rng: np.random.Generator
) -> bytes:
    """`lines` at their depths in `room` bytes of `haystack`, ended by a newline."""
    size = room - sum(len(line) for _, line in lines) - 1
    if not 0 < size <= len(haystack):
        raise ValueError(
            f"{room} bytes of prompt with {len(lines)} lines hidden in it must leave 1 to "
            f"{len(haystack)} bytes of text around them; got {size}"
        )
    start = int(rng.integers(0, len(haystack) - size + 1))
    context = insert_lines(haystack[start : start + size], lines)
    return context if context.endswith(b"\n") else context + b"\n"


def random_depths(rng: np.random.Generator, count: int) -> list[float]:
    return rng.uniform(0.0, DEEPEST, count).tolist()
