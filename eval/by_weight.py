"""Find a budget by weight: how much each layer matters, and which weight visits so many rows.

A budget of rows gives each layer and token the same. One by weight (`Budget.min_weight`) takes
the rows that are predicted to weigh enough, and weights of different layers are made comparable by
what they do to the next token: `layer_importance` is the square root of how far its distribution
moves (KL divergence from dense attention) where that layer alone is sparse. Over the layers these
divergences nearly add up to that of all of them together.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from saap import hf
from saap.budget import Budget
from saap.methods import Method

from .decoding import Decoder, decoder
from .tasks.base import text_tokens

WHOLE = 2**31 - 1
MOST_IMPORTANT = 4.0
"""Importance is kept in 1/4..4: few tokens tell no more than that."""
CAP = 6
"""The most rows of a step, of those of the budget by rows."""


@dataclass(frozen=True)
class Found:
    """`divergence`: nats from dense attention with the budget of rows, by weight with all layers
    alike, and with their importance. `rows`: what a step of each visits in the mean, per head and
    layer, sinks and window counted in."""

    budget: Budget
    divergence: tuple[float, float, float]
    rows: tuple[float, float, float]


def advise(model, tokenizer, text: bytes, *, context: int, n_texts: int, **options) -> Found:
    """`find` on `n_texts` texts of `context` tokens, evenly spread; the last one judges."""
    *learned_from, judged = (
        text_tokens(tokenizer, text, context, number, n_texts) for number in range(n_texts)
    )
    return find(model, learned_from=learned_from, judged=judged, **options)


def find(
    model,
    method: Method,
    learned_from: list[Tensor],
    judged: Tensor,
    budget: Budget,
    *,
    n_tokens: int = 32,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Found:
    """The budget by weight that visits as many rows in the mean as `budget` does by `max_tokens`.

    learned_from, judged: texts `[N]`, whose last `n_tokens` tokens are decoded; figures are of
    `judged` alone, which is in none of the others.
    """
    layers = hf.model_layers(model)
    searched = [n for n, layer in enumerate(layers) if layer.is_full]
    weights = []
    total, done = len(learned_from) * (len(searched) + 1) + 2, 0
    sums = torch.zeros(len(layers), dtype=torch.float64)
    for tokens in learned_from:
        with decoding(model, method, budget, tokens, n_tokens) as (own, rest):
            dense = logits(own, rest, [whole(budget)] * len(searched))
            for place, number in enumerate(searched):
                progress("layers", done, total)
                budgets = [whole(budget)] * len(searched)
                budgets[place] = budget
                sums[number] += divergence(dense, logits(own, rest, budgets))
                done += 1
            weights.append(weight_of(own, rest, budget, importance(sums, searched)))
            done += 1
    progress("budgets", done, total)
    with decoding(model, method, budget, judged, n_tokens) as (own, rest):
        dense = logits(own, rest, [whole(budget)] * len(searched))
        plain = dataclasses.replace(
            budget,
            max_tokens=CAP * budget.max_tokens,
            min_weight=weight_of(own, rest, budget, None),
        )
        best = dataclasses.replace(
            plain, min_weight=weights[-1], layer_importance=importance(sums, searched)
        )
        nats, rows = [], []
        for tried in (budget, plain, best):
            nats.append(divergence(dense, logits(own, rest, [tried] * len(searched))))
            rows.append(own.visited.rows / max(1, own.visited.steps))
    progress("budgets", total, total)
    return Found(best, tuple(nats), tuple(rows))


@contextmanager
def decoding(model, method, budget, tokens, n_tokens) -> Iterator[tuple[Decoder, Tensor]]:
    """A decoder after all but the last tokens of a text, and these."""
    read = hf.read_context(model, tokens[:-n_tokens])
    with decoder(model, read, method, budget, n_tokens) as own:
        yield own, tokens[-n_tokens:]


def whole(budget: Budget) -> Budget:
    return dataclasses.replace(budget, dense_below=WHOLE)


def logits(own: Decoder, tokens: Tensor, budgets: list[Budget]) -> Tensor:
    """As after a restart, each layer of full attention under a budget of its own."""
    own.restart(budgets[0])
    for layer, budget in zip(own.cache.saap_layers, budgets, strict=True):
        layer.store.budget = budget
    return own.logits(tokens)


def divergence(dense: Tensor, other: Tensor) -> float:
    """KL divergence of next-token distributions, the mean in nats."""
    p, q = (t.double().log_softmax(-1) for t in (dense, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def importance(sums: Tensor, searched: list[int]) -> tuple[float, ...]:
    """A number for each layer, 1 in the geometric mean, by the divergences of those `searched`."""
    own = sums[searched].clamp(min=float(sums.max()) * 1e-6 + 1e-30).sqrt()
    own = (own / own.log().mean().exp()).clamp(1 / MOST_IMPORTANT, MOST_IMPORTANT)
    found = [1.0] * len(sums)
    for number, value in zip(searched, own.tolist(), strict=True):
        found[number] = round(value, 2)
    return tuple(found)


def weight_of(
    own: Decoder, tokens: Tensor, budget: Budget, importance: tuple[float, ...] | None
) -> float:
    """The least weight with which steps visit as many rows in the mean, to two digits."""
    n_layers = len(own.cache.saap_layers)
    logits(own, tokens, [budget] * n_layers)
    wanted = own.visited.rows
    low, high = -7.0, 0.0  # of the logarithm to the base 10
    for _ in range(7):
        middle = (low + high) / 2
        tried = dataclasses.replace(
            budget, max_tokens=CAP * budget.max_tokens, min_weight=10**middle,
            layer_importance=importance,
        )  # fmt: skip
        logits(own, tokens, [tried] * n_layers)
        low, high = (middle, high) if own.visited.rows > wanted else (low, middle)
    return float(f"{10 ** ((low + high) / 2):.2g}")
