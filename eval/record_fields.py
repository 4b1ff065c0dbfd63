"""What a record has to hold, so that whatever reads records can rely on it."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

COSTS = ("selectivity", "bytes_read", "router_bytes")
HEADS = ("middle_mass", "middle_caught", "all_caught", "needle_mass", "needle_lost")
PARTS = tuple(f"{part}_us" for part in ("route", "select", "attend", "other", "step", "dense"))
PLACE = ("unit", "task", "context")
# What scores are made of, by task; every other task is judged by its answers.
NEEDED = {
    "attention": (*COSTS, "layer", "queries", "output_error", *HEADS),
    "perplexity": (*COSTS, "nll", "tokens"),
    "drafting": (*COSTS, "accepted", "verifications"),
    "speed": (*COSTS, *PARTS, "build_ms", "load"),
}
# A metric is a ratio: what it is divided by.
PARTNERS = {
    "middle_caught": "middle_mass",
    "needle_lost": "needle_mass",
    "output_error": "queries",
    "nll": "tokens",
    "divergence": "tokens",
    "accepted": "verifications",
}
OF_A_HEAD = ("layer", "head", "middle_mass_share", "explained", "keys", "queries")  # no method's


MOST = 2**53
"""Integers beyond are not exact as floats, and arrays of NumPy hold them as objects."""


def is_number(value) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) <= MOST
    return isinstance(value, float) and math.isfinite(value)


def is_numbers(value) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_number, value))


def is_masses(value) -> bool:
    return is_numbers(value) and min(value) >= 0


def is_share(value) -> bool:
    return is_number(value) and 0 <= value <= 1


def is_points(value) -> bool:
    return isinstance(value, list) and all(is_numbers(p) and len(p) == 2 for p in value)


def is_text(value) -> bool:
    return isinstance(value, str) and bool(value.strip())


def is_count(value) -> bool:
    return isinstance(value, int) and is_number(value) and value >= 0


def is_some(value) -> bool:
    return is_count(value) and value > 0


KINDS: dict[str, tuple[Callable[[object], bool], str]] = {
    **dict.fromkeys(("unit", "task", "method", "budget"), (is_text, "a text")),
    **dict.fromkeys(("layer", "head", "accepted"), (is_count, "an integer from 0")),
    **dict.fromkeys(
        ("context", "queries", "tokens", "verifications"), (is_some, "an integer from 1")
    ),
    **dict.fromkeys(HEADS, (is_masses, "a list of numbers from 0")),
    **dict.fromkeys(PARTS, (is_numbers, "a list of numbers")),
    "accuracy": (is_share, "a number from 0 to 1"),
    **dict.fromkeys(
        (*COSTS, "output_error", "nll", "divergence", "build_ms", "load",
         "middle_mass_share", "explained"),
        (is_number, "a number"),
    ),
    "depth": (lambda value: value is None or is_number(value), "a number or none"),
    "bucket_sizes": (is_numbers, "a list of numbers"),
}  # fmt: skip
POINTS = {"keys": (is_points, "points"), "queries": (is_points, "points")}
MISSING = object()


def check_records(path: Path, records: list) -> None:
    """Raise ValueError for the first record that lacks its place, or whose values are no values.

    `path`: the file, for the message.
    """
    sizes: dict[tuple, int] = {}
    for record in records:
        if not isinstance(record, dict):
            raise ValueError(f"{path}: a record must be a mapping; got {record!r:.60}")
        of_method = "method" in record
        check_fields(path, record, (*PLACE, *(("method", "budget") if of_method else OF_A_HEAD)))
        kinds = KINDS if of_method else KINDS | POINTS
        check_fields(path, record, [name for name in record if name in kinds])
        check_fields(path, record, [to for name, to in PARTNERS.items() if name in record])
        for names in (HEADS, PARTS):
            for name in names:
                size = len(record[name]) if name in record else None
                expected = sizes.setdefault((record["task"], names), size or 0)
                if size is not None and size != (expected or size):
                    raise wrong(path, record, name, f"{expected} numbers, as in others", size)
        if "needle_lost" in record:
            both = zip(record["needle_lost"], record["needle_mass"], strict=True)
            for lost, mass in both:
                if lost > mass:
                    raise wrong(path, record, "needle_lost", f"at most the needles' {mass}", lost)


def check_scored(path: Path, records: list[dict]) -> None:
    """Raise ValueError for the first record that lacks what its task is scored by, and for a
    method of which a layer has fewer records than another."""
    layers: dict[tuple, Counter] = defaultdict(Counter)
    for record in records:
        if "method" in record:
            check_fields(path, record, NEEDED.get(record["task"], (*COSTS, "accuracy")))
            if record["task"] == "attention":
                place = record["context"], record["method"], record["budget"]
                layers[place][record["layer"]] += 1
    for (context, method, budget), counts in layers.items():
        most, least = max(counts, key=counts.get), min(counts, key=counts.get)
        if counts[most] > counts[least]:
            raise ValueError(
                f"{path}: {method} at {context} tokens and budget {budget} must have as many "
                f"records of every layer; got {counts[most]} of layer {most} and {counts[least]} "
                f"of layer {least}"
            )


def check_fields(path: Path, record: dict, names) -> None:
    kinds = KINDS if "method" in record else KINDS | POINTS
    for name in names:
        holds, kind = kinds[name]
        value = record.get(name, MISSING)
        if not holds(value):
            raise wrong(path, record, name, kind, "none" if value is MISSING else repr(value))


def wrong(path: Path, record: dict, name: str, kind: str, value) -> ValueError:
    unit = record.get("unit")
    return ValueError(f"{path}: {name} of unit {unit!r:.60} must be {kind}; got {value!s:.60}")
