"""Measure a model on a text, and say how much of its cache a decode step should visit.

For each share of the cache: recall, output error, and the time of whole decode steps beside dense
ones over the same store, in turns. What is recommended is the smallest share whose output error is
at most the one asked for, and whether it pays at the context that was measured.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from saap import hf
from saap.budget import Budget
from saap.methods import Method, find_method

from .decoding import decoder, whole
from .tasks import attention
from .tasks.base import text_tokens
from .variants import Point, Variant

SHARES = (0.02, 0.05, 0.1, 0.2, 0.3)
N_QUERIES, TURNS, UNTIMED = 32, 5, 2
STEPS = 16
"""Of a turn: in contexts of up to 8k tokens rows join the middle in one of them, or in two."""
OUTSTANDING = 3.0
"""A layer is told apart when its output error is so many times the median layer's."""


@dataclass(frozen=True)
class Measured:
    """One share of the cache: `errors` of layers, by their numbers; times in ms.
    `needles_lost`: of what single rows of at least 5 % of a head's attention hold."""

    share: float
    budget: Budget
    recall: float
    needles_lost: float | None
    error: float
    errors: dict[int, float]
    step_ms: float
    speedup: float


@dataclass(frozen=True)
class Advice:
    """What was measured, and the smallest share whose error is at most `target`, if any."""

    context: int
    target: float
    dense_ms: float
    transformers_ms: float
    measured: list[Measured] = field(default_factory=list)

    @property
    def chosen(self) -> Measured | None:
        good = [m for m in self.measured if m.error <= self.target]
        return min(good, key=lambda m: m.share) if good else None

    @property
    def pays(self) -> bool:
        return self.chosen is not None and self.chosen.speedup > 1

    @property
    def hard_layers(self) -> tuple[int, ...]:
        """Layers whose error stands out at the chosen share: what to keep dense first."""
        if self.chosen is None:
            return ()
        errors = self.chosen.errors
        usual = statistics.median(errors.values())
        found = [n for n, e in errors.items() if e > max(OUTSTANDING * usual, self.target)]
        return tuple(sorted(found))


def advise(
    model,
    tokenizer,
    text: bytes,
    *,
    context: int,
    n_texts: int = 2,
    target: float = 0.1,
    method: str = "saap",
    index=None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Advice:
    """Measure `n_texts` texts of `context` tokens.

    `target`: output error, `|sparse - dense| / |dense|` of attention outputs in the mean.
    Raises ValueError where the text is too short or no share is above sinks and window.
    """
    variant = Variant(method, find_method(method)(index))
    shares = possible(context)
    points = variant.points(shares, context - N_QUERIES, "group")
    records = []
    for number in range(n_texts):
        progress(f"text {number + 1} of {n_texts}", number, n_texts + 1)
        tokens = text_tokens(tokenizer, text, context, number, n_texts)
        records += attention.evaluate(model, tokens, [(variant, points)], N_QUERIES)
    progress("steps", n_texts, n_texts + 1)
    read = hf.read_context(model, tokens[:-N_QUERIES])
    times = timed(model, read, variant.method, points)
    progress("steps", n_texts + 1, n_texts + 1)
    measured = [
        about(share, point.budget, [r for r in records if r["budget"] == point.label], times)
        for share, point in zip(shares, points, strict=True)
    ]
    return Advice(
        context,
        target,
        statistics.median(times["dense"]),
        statistics.median(times["transformers"]),
        measured,
    )


def possible(context: int) -> tuple[float, ...]:
    least = 1.5 * (Budget.n_sink + Budget.window) / context
    found = tuple(share for share in SHARES if share > least)
    if not found:
        raise ValueError(
            f"context must be so long that {SHARES[-1]:.0%} of it is more than sinks and window; "
            f"got {context}"
        )
    return found


def about(share: float, budget: Budget, records: list[dict], times: dict) -> Measured:
    errors: dict[int, list[float]] = {}
    for record in records:
        errors.setdefault(record["layer"], []).append(record["output_error"] / record["queries"])
    caught, mass, lost, needles = (
        sum(sum(r[name]) for r in records)
        for name in ("middle_caught", "middle_mass", "needle_lost", "needle_mass")
    )
    own = times[share]
    return Measured(
        share,
        budget,
        caught / mass if mass else 1.0,
        lost / needles if needles else None,
        statistics.fmean(e for each in errors.values() for e in each),
        {layer: statistics.fmean(each) for layer, each in errors.items()},
        statistics.median(own),
        statistics.median(d / o for d, o in zip(times["dense"], own, strict=True)),
    )


def timed(model, read: hf.ReadContext, method: Method, points: list[Point]) -> dict:
    """Milliseconds of decode steps: of each share, dense over our store, and of transformers.

    They take turns, so that a machine that is busy slows all of them. The first steps of a turn
    are not timed: after a rewind a step prepares the next ones, which a decoder does now and then.
    Steps are only taken: what they read is not counted.
    """
    found: dict = {float(point.label): [] for point in points} | {"dense": [], "transformers": []}
    with decoder(model, read, method, points[0].budget, UNTIMED + STEPS) as own:
        for turn in range(TURNS + 1):
            for share, budget in [
                *((float(point.label), point.budget) for point in points),
                ("dense", whole(points[0].budget)),
            ]:
                own.restart(budget)
                own_steps(model, own.cache, UNTIMED)
                ms = steps_ms(lambda: own_steps(model, own.cache, STEPS))
                if turn:  # the first one compiles kernels and learns from the prompt
                    found[share].append(ms)
            cache = hf.dynamic_cache_from(model, read)
            own_steps(model, cache, UNTIMED)
            ms = steps_ms(lambda cache=cache: own_steps(model, cache, STEPS))
            if turn:
                found["transformers"].append(ms)
    return found


@torch.no_grad()
def own_steps(model, cache, n: int) -> None:
    for _ in range(n):
        model(torch.zeros(1, 1, dtype=torch.long, device=model.device), **hf.over(cache))


def steps_ms(steps: Callable[[], object]) -> float:
    begin = time.perf_counter()
    steps()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin) / STEPS
