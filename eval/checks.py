"""Results that cannot be: told in the report and on the terminal, for `saap report --strict`.

A benchmark's worst mistakes look like good news. A method that finds more than the oracle of its
own lists, or that gives dense attention's output while it claims to read less, was not run as its
records say; neither was one that visits more than its budget.
"""

from collections import defaultdict
from pathlib import Path

import numpy as np

from saap.methods.saap import SaapSelector

from .bootstrap import ratio_difference
from .record_fields import check_scored
from .records import RECORDS, missing_units, read_run
from .units import by_unit, paired, share_of

# Methods over the trained partition, whole buckets or cells: `oracle` knows their true masses.
# For all others the ceiling is the oracle over single tokens.
OVER_PARTITION = ("random", "kmeans", "linear", "mlp", "moments", "kmeans-cells", "blend")
ORACLES = ("oracle", "oracle-tokens")
# An oracle takes lists by mass a row and cuts the last one to its newest rows, and adds the heads
# of a group unweighted: the best choice of rows may hold a little more.
MARGIN = 0.01
LEVEL = 0.99
FULL = 0.999  # selectivity from which a method visits everything
EQUAL = 1e-6  # output error, relative: float32 sums in another order
LEAST_MASS = 0.01  # share of attention in the middle without which leaving it out changes nothing
BUDGET_SLACK = 1.02
SHORT = SaapSelector.least_rows + 256
"""Contexts that `saap` may visit whole; with their sinks, window and the tokens that ask."""


def check_folder(folder: Path) -> list[str]:
    """What is missing of a result folder, and its `suspicions`; ValueError for records that lack
    what is judged."""
    records = read_run(folder)[1]
    check_scored(folder / RECORDS, records)
    return [*incomplete(folder), *suspicions(records)]


def incomplete(folder: Path) -> list[str]:
    """What a run was to judge, and did not get to; one line each."""
    return [
        f"the run was not finished: {there} of {planned} texts or prompts of {task} at "
        f"{int(context):,} tokens are in; run the same `saap eval` again to go on"
        for name, (there, planned) in missing_units(folder).items()
        for task, _, context in [name.partition("/")]
    ]


def suspicions(records: list[dict]) -> list[str]:
    """One line each; empty when nothing is suspicious."""
    return [
        *beats_its_oracle(records),
        *equals_dense(records),
        *exceeds_budget(records),
        *dense_is_inexact(records),
    ]


def ceilings(method: str) -> tuple[str, ...]:
    if method in ("dense", *ORACLES):
        return ()
    return ORACLES if base_name(method) in OVER_PARTITION else ("oracle-tokens",)


def base_name(method: str) -> str:
    """`kmeans-online[rows_per_cluster=8]` is a variant of `kmeans-online`."""
    return method.split("[")[0]


def beats_its_oracle(records: list[dict]) -> list[str]:
    units = by_unit(records)
    found = []
    for (place, metric), own in units.items():
        task, context, method, budget = place
        visited = np.divide(*sum(units[place, "selectivity"].values()))
        if metric != "recall_middle" or is_whole(context, visited):
            continue
        for oracle in ceilings(method):
            pairs = paired(units.get(((task, context, oracle, budget), metric), {}), own)
            if pairs is None:
                continue
            gain = ratio_difference(*pairs, level=LEVEL)
            # Too few texts for a bound: the difference itself, against the margin.
            surely = gain.value if gain.low is None else gain.low
            if gain.value > MARGIN and surely > 0:
                found.append(
                    f"{method} finds {gain.value:+.1%} more of the middle than {oracle}, the "
                    f"ceiling of its lists ({task}, {context:,} tokens, budget {budget})"
                )
    return found


def equals_dense(records: list[dict]) -> list[str]:
    groups = defaultdict(list)
    for r in records:
        if "method" in r and r["method"] != "dense":
            groups[r["task"], r["context"], r["method"], r["budget"]].append(r)
    dense_nll = {
        (r["unit"], r["task"]): r["nll"] for r in records if "nll" in r and r["method"] == "dense"
    }
    found = []
    for (task, context, method, budget), members in groups.items():
        selectivity = sum(r["selectivity"] for r in members) / len(members)
        if selectivity >= FULL:
            continue
        where = f"({task}, {context:,} tokens, budget {budget}), and visits {selectivity:.1%}"
        if "output_error" in members[0]:
            queries = sum(r["queries"] * len(r["middle_mass"]) for r in members)
            mass = sum(sum(r["middle_mass"]) for r in members) / queries
            error = sum(r["output_error"] for r in members) / sum(r["queries"] for r in members)
            if mass > LEAST_MASS and error < EQUAL:
                found.append(f"{method} has the same output as dense attention {where}")
        elif "nll" in members[0]:
            pairs = [(r["nll"], dense_nll.get((r["unit"], task))) for r in members]
            if all(d is not None and abs(n - d) <= EQUAL * abs(d) for n, d in pairs):
                found.append(f"{method} predicts exactly what dense attention does {where}")
    return found


def exceeds_budget(records: list[dict]) -> list[str]:
    groups = defaultdict(list)
    for r in records:
        asked = r["task"] == "attention" and r["method"] != "dense"
        if asked and share_of(r["budget"]) is not None:
            groups[r["context"], r["method"], r["budget"]].append(r["selectivity"])
    found = []
    for (context, method, budget), values in groups.items():
        mean = sum(values) / len(values)
        # Queries later in the text have a longer window: a few rows more than at the start.
        if mean > share_of(budget) * BUDGET_SLACK + 64 / context and not is_whole(context, mean):
            found.append(
                f"{method} visits {mean:.1%} of the cache at a budget of {share_of(budget):.1%} "
                f"({context:,} tokens)"
            )
    return found


def is_whole(context: int, selectivity: float) -> bool:
    """Whether all was visited because the context is too short to learn from."""
    return context <= SHORT and selectivity >= FULL


def dense_is_inexact(records: list[dict]) -> list[str]:
    errors = [
        r["output_error"] / r["queries"]
        for r in records
        if r.get("method") == "dense" and "output_error" in r
    ]
    if errors and max(errors) > 1e-4:
        return [f"dense attention differs from itself by {max(errors):.1e}: nothing here holds"]
    return []
