"""RULER's needles with several keys, values or questions, as named pass keys in real text.

Single needles saturate; here names have to be matched among many, or several places found.
"""

from .passkey import NAMES, Wording
from .prompts import Prompt, PromptTask, hide, random_depths

N_MANY_KEYS = 32
N_VALUES = N_QUERIES = 4


def draw_names(rng, count):
    return [NAMES[i] for i in rng.permutation(len(NAMES))[:count]]


def as_lines(wording: Wording, depths, pairs):
    return [(d, wording.statement(n, k).encode()) for d, (n, k) in zip(depths, pairs, strict=True)]


class MultiKey(PromptTask):
    """One pass key is asked for among 32 that are named alike."""

    name = "multi-key"

    def make(self, haystack, n_bytes, rng, depth, n_questions=1):
        # Short prompts hold fewer: at most a third of the bytes are keys.
        count = max(2, min(N_MANY_KEYS, n_bytes // 90))
        pairs = [(n, self.wording.random_key(rng)) for n in draw_names(rng, count)]
        depths = [depth, *random_depths(rng, count - 1)]
        asked = list(zip(depths, pairs, strict=True))[:n_questions]
        asks = [self.wording.question(name).encode() for _, (name, _) in asked]
        lines = as_lines(self.wording, depths, pairs)
        context = hide(haystack, lines, n_bytes - max(map(len, asks)), rng)
        return [
            Prompt(context, (ask,), ((key,),), depth)
            for ask, (depth, (_, key)) in zip(asks, asked, strict=True)
        ]


class MultiValue(PromptTask):
    """One name has four pass keys; all are asked for at once."""

    name = "multi-value"
    slack = 16

    def make(self, haystack, n_bytes, rng, depth, n_questions=1):
        name, *others = draw_names(rng, 1 + N_VALUES)
        values = [self.wording.random_key(rng) for _ in range(N_VALUES)]
        pairs = [(name, v) for v in values] + [(n, self.wording.random_key(rng)) for n in others]
        lines = as_lines(self.wording, [depth, *random_depths(rng, len(pairs) - 1)], pairs)
        ask = f"# All {N_VALUES} pass keys of {name} above: ".encode()
        context = hide(haystack, lines, n_bytes - len(ask), rng)
        return [Prompt(context, (ask,), (tuple(values),), depth)]


class MultiQuery(PromptTask):
    """Four of twelve pass keys are asked for, one after the other; answers stay in the context."""

    name = "multi-query"

    def make(self, haystack, n_bytes, rng, depth, n_questions=1):
        pairs = [(n, self.wording.random_key(rng)) for n in draw_names(rng, 3 * N_QUERIES)]
        lines = as_lines(self.wording, [depth, *random_depths(rng, len(pairs) - 1)], pairs)
        asked = pairs[:N_QUERIES]
        breaks = ["", *["\n"] * (N_QUERIES - 1)]
        asks = tuple(
            f"{b}{self.wording.question(n)}".encode()
            for b, (n, _) in zip(breaks, asked, strict=True)
        )
        context = hide(haystack, lines, n_bytes - sum(map(len, asks)), rng)
        return [Prompt(context, asks, tuple((k,) for _, k in asked), depth)]
