"""`saap compare A B`: what changed from one result folder to another, and is it more than noise?

Both runs must have judged the same texts and prompts; each difference is then held against a
paired bootstrap over them. Times are shown but decide nothing: a machine that is busy for one of
the two runs slows all its units alike, which no resampling of units can show.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .bootstrap import Interval, ratio_difference
from .checks import incomplete
from .records import read_inputs, read_run
from .units import METRICS, Metric, Place, by_unit, paired

# What decides which texts and prompts a unit holds.
SAME_TEXTS = (
    "seed", "n_texts", "n_queries", "n_prompts", "n_questions", "n_distractors", "n_scored",
    "chat",
)  # fmt: skip
# Differences below rounding are none: another number of threads adds in another order.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Change:
    """One metric at one place. `verdict`: same, better, worse, unclear (too few units), told."""

    place: Place
    metric: Metric
    before: float
    after: float
    units: int
    interval: Interval

    @property
    def verdict(self) -> str:
        if abs(self.after - self.before) <= ROUNDING * max(abs(self.before), abs(self.after)):
            return "same"
        if self.metric.noisy:
            return "told"
        if self.interval.low is None:
            return "unclear"
        if not self.interval.excludes_zero:
            return "same"
        return "better" if self.interval.value * self.metric.better > 0 else "worse"


@dataclass(frozen=True)
class Comparison:
    changes: list[Change]
    only_a: list[Place]
    only_b: list[Place]
    settings: list[str]
    incomplete: list[str]

    @property
    def worse(self) -> list[Change]:
        return [c for c in self.changes if c.verdict == "worse"]


def compare(a: Path, b: Path, *, level: float = 0.99) -> Comparison:
    """Compare two runs; raise ValueError when their texts differ or they share no result."""
    if not 0.5 <= level < 1:
        raise ValueError(f"level must be at least 0.5 and below 1; got {level}")
    (run_a, records_a), (run_b, records_b) = read_run(a), read_run(b)
    check_same_texts(run_a, run_b, read_inputs(a), read_inputs(b))
    units_a, units_b = by_unit(records_a), by_unit(records_b)
    changes = []
    for place, metric in units_a:
        pairs = paired(units_a[place, metric], units_b.get((place, metric), {}))
        if pairs is None:
            continue
        sums = [part.sum(0) for part in pairs]
        before, after = (float(top / bottom) if bottom else 0.0 for top, bottom in sums)
        interval = ratio_difference(*pairs, level=level)
        changes.append(Change(place, METRICS[metric], before, after, len(pairs[0]), interval))
    if not changes:
        raise ValueError(
            f"{a} and {b} must share at least one result, of the same task, context, method and "
            "budget; got none"
        )
    places_a, places_b = ({place for place, _ in units} for units in (units_a, units_b))
    return Comparison(
        changes,
        sorted(places_a - places_b),
        sorted(places_b - places_a),
        list(differences(run_a, run_b)),
        [f"{folder}: {line}" for folder in (a, b) for line in incomplete(folder)],
    )


def check_same_texts(run_a: dict, run_b: dict, inputs_a: dict, inputs_b: dict) -> None:
    for key in SAME_TEXTS:
        mine, other = run_a["config"].get(key), run_b["config"].get(key)
        if mine != other and None not in (mine, other):
            raise ValueError(
                f"both runs must judge the same texts and prompts; got {key} {mine} in the first "
                f"and {other} in the second"
            )
    for unit in inputs_a:
        if inputs_b.get(unit, inputs_a[unit]) != inputs_a[unit]:
            raise ValueError(
                "both runs must judge the same corpus with the same tokenizer; got another text "
                f"for {unit} in the second"
            )


def differences(run_a: dict, run_b: dict) -> Iterator[str]:
    """Settings and versions that are not the same, one line each."""
    for part in ("model", "version", "config", "environment", "index"):
        yield from _unequal(part, run_a.get(part), run_b.get(part))


def _unequal(name: str, a, b) -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys([*a, *b]):
            yield from _unequal(f"{name}.{key}", a.get(key), b.get(key))
    elif a != b:
        yield f"{name}: {a} → {b}"
