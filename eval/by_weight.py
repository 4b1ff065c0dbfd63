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

from .decoding import Decoder, decoder, divergence, whole
from .tasks.base import text_tokens

Progress = Callable[[str, int, int], None]
MOST_IMPORTANT = 4.0
"""Importance is kept in 1/4..4: few tokens tell no more than that."""
CAP = 6
"""The most rows of a step, of those of the budget by rows."""


def no_progress(*_) -> None:
    pass


@dataclass(frozen=True)
class Measured:
    """`divergence`: nats from dense attention; `rows`: what a step visits in the mean, per head
    and layer, sinks and window counted in."""

    budget: Budget
    divergence: float
    rows: float


def advise(
    model, tokenizer, text: bytes, *, method: Method, budget: Budget, context: int, n_texts: int,
    progress: Progress = no_progress,
) -> list[Measured]:  # fmt: skip
    """Budgets that visit about as many rows in the mean: by `max_tokens`, by weight with all
    layers alike, by weight with their importance.

    Of `n_texts` texts of `context` tokens, evenly spread, the last one judges what was found on
    the others, at least one.
    """
    *texts, last = (
        text_tokens(tokenizer, text, context, number, n_texts) for number in range(n_texts)
    )
    found = learn(model, method, texts, budget, progress=progress)
    return measure(model, method, [last], [budget, *found], progress=progress)


def check_follows(model, method: Method) -> None:
    """ValueError for a method that follows no least weight, before anything is measured."""
    searched = next(layer for layer in hf.model_layers(model) if layer.is_full)
    method.selector(searched.info).check_budget(Budget(max_tokens=1, min_weight=1.0))


def learn(
    model, method: Method, texts: list[Tensor], budget: Budget, *, n_tokens: int = 32,
    progress: Progress = no_progress,
) -> tuple[Budget, Budget]:  # fmt: skip
    """Budgets by weight that visit as many rows in the mean as `budget` does by `max_tokens`: with
    all layers alike, and with their importance.

    The last `n_tokens` tokens of each text `[N]` are decoded.
    """
    check_follows(model, method)
    layers = hf.model_layers(model)
    searched = [n for n, layer in enumerate(layers) if layer.is_full]
    sums = torch.zeros(len(layers), dtype=torch.float64)
    total, done = len(texts) * len(searched) + 1, 0
    for text in texts:
        with decoding(model, method, budget, text, n_tokens) as (own, rest):
            everywhere = [whole(budget)] * len(searched)
            dense = logits(own, rest, everywhere)
            for place, number in enumerate(searched):
                progress("layers", done, total)
                done += 1
                budgets = everywhere.copy()
                budgets[place] = budget
                sums[number] += divergence(dense, logits(own, rest, budgets))
            if text is texts[-1]:
                progress("least weight", done, total)
                found = [
                    as_many_rows(own, rest, budget, told)
                    for told in (None, importance(sums, searched))
                ]
    progress("least weight", total, total)
    return tuple(found)


def measure(
    model, method: Method, texts: list[Tensor], budgets: list[Budget], *, n_tokens: int = 32,
    progress: Progress = no_progress,
) -> list[Measured]:  # fmt: skip
    """Means over the last `n_tokens` tokens of each text `[N]`; budgets lay out rows alike."""
    nats, rows = torch.zeros(2, len(budgets), dtype=torch.float64)
    for number, text in enumerate(texts):
        progress("budgets", number, len(texts))
        with decoding(model, method, budgets[0], text, n_tokens) as (own, rest):
            n_layers = len(own.cache.saap_layers)
            dense = logits(own, rest, [whole(budgets[0])] * n_layers)
            for i, found in enumerate(against(dense, own, rest, budgets)):
                nats[i] += found[0]
                rows[i] += found[1]
    progress("budgets", len(texts), len(texts))
    means = ((t / len(texts)).tolist() for t in (nats, rows))
    return [Measured(*own) for own in zip(budgets, *means, strict=True)]


@contextmanager
def decoding(model, method, budget, tokens, n_tokens) -> Iterator[tuple[Decoder, Tensor]]:
    """A decoder after all but the last tokens of a text, and these."""
    read = hf.read_context(model, tokens[:-n_tokens])
    with decoder(model, read, method, budget, n_tokens) as own:
        yield own, tokens[-n_tokens:]


def against(
    dense: Tensor, own: Decoder, tokens: Tensor, budgets: list[Budget]
) -> Iterator[tuple[float, float]]:
    """For each budget, in all layers: nats from `dense` logits, and rows that a step visits."""
    for budget in budgets:
        found = logits(own, tokens, [budget] * len(own.cache.saap_layers))
        yield divergence(dense, found), own.visited.rows / own.visited.steps


def logits(own: Decoder, tokens: Tensor, budgets: list[Budget]) -> Tensor:
    """As after a restart, each layer of full attention under a budget of its own."""
    own.restart(budgets[0])
    for layer, budget in zip(own.cache.saap_layers, budgets, strict=True):
        layer.store.budget = budget
    return own.logits(tokens)


def importance(sums: Tensor, searched: list[int]) -> tuple[float, ...]:
    """A number for each layer, 1 in the geometric mean, by the divergences of those `searched`."""
    own = sums[searched]
    own = own.clamp(min=1e-6 * float(own.max()) + 1e-30).sqrt()
    own = (own / own.log().mean().exp()).clamp(1 / MOST_IMPORTANT, MOST_IMPORTANT)
    found = [1.0] * len(sums)
    for number, value in zip(searched, own.tolist(), strict=True):
        found[number] = round(value, 2)
    return tuple(found)


def as_many_rows(
    own: Decoder, tokens: Tensor, budget: Budget, importance: tuple[float, ...] | None
) -> Budget:
    """That by weight whose steps visit as many rows in the mean; the weight to two digits."""
    n_layers = len(own.cache.saap_layers)
    logits(own, tokens, [budget] * n_layers)
    wanted = own.visited.rows
    bound = dataclasses.replace(budget, max_tokens=CAP * budget.max_tokens)
    low, high = -7.0, 0.0  # of the logarithm to the base 10
    for _ in range(7):
        middle = (low + high) / 2
        tried = dataclasses.replace(bound, min_weight=10**middle, layer_importance=importance)
        logits(own, tokens, [tried] * n_layers)
        low, high = (middle, high) if own.visited.rows > wanted else (low, middle)
    least = float(f"{10 ** ((low + high) / 2):.2g}")
    return dataclasses.replace(bound, min_weight=least, layer_importance=importance)
