"""From raw records to scores: one object a (task, context, method, budget).

Recall of the middle is captured middle mass over middle mass, summed over queries and heads before
dividing, so that heads which never look far do not drown the few that do. `worst_head` is the
lowest recall among heads that hold at least 5 % of their mass in the middle. `needles_lost` is the
share of what single rows of at least 5 % of a head's attention hold (`tasks/needle_rows.py`) that
is not visited.
"""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from saap.index.tensor_files import write_atomically
from saap.notebook import rows_table

from .bootstrap import ratio_difference
from .record_fields import check_scored
from .records import RECORDS, read_run
from .units import by_unit, paired

SCORES = "scores.json"
FAR_HEAD_SHARE = 0.05


NO_ATTENTION = dict.fromkeys(
    ("recall_all", "recall_middle", "recall_of_oracle", "output_error", "needles_lost")
)
"""Of tasks that are judged by what the model says."""


def score_run(folder: Path) -> list[dict]:
    """Score a result folder and write `scores.json` into it."""
    run, records = read_run(folder)
    check_scored(folder / RECORDS, records)
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for record in records:
        if "method" not in record:
            continue
        key = (record["task"], record["context"], record["method"], record["budget"])
        groups[key].append(record)
    scores = []
    for (task, context, method, budget), members in groups.items():
        measure = MEASURES.get(task, score_answers)
        scores.append(
            {
                "method": method,
                "model": run.get("model"),
                "task": task,
                "context": context,
                "budget": budget,
                **mean_costs(members),
                **measure(members),
            }
        )
    add_share_of_oracle(scores)
    add_difference_to_dense(scores, records)
    write_atomically(folder / SCORES, (json.dumps(scores, indent=1) + "\n").encode())
    return scores


def mean_costs(members: list[dict]) -> dict:
    return {
        name: float(np.mean([r[name] for r in members]))
        for name in ("selectivity", "bytes_read", "router_bytes")
    }


def score_attention(members: list[dict]) -> dict:
    per_layer = defaultdict(list)
    for record in members:
        per_layer[record["layer"]].append(record)
    layers = sorted(per_layer)

    def total(name):  # [layer, query head]
        return np.array([np.sum([r[name] for r in per_layer[i]], 0) for i in layers])

    queries = sum(r["queries"] for r in per_layer[layers[0]])
    mass, caught, whole = total("middle_mass"), total("middle_caught"), total("all_caught")
    needles, lost = total("needle_mass").sum(), total("needle_lost").sum()
    with np.errstate(invalid="ignore", divide="ignore"):
        recall = np.where(mass > 0, caught / mass, np.nan)
    far = mass / queries >= FAR_HEAD_SHARE
    return {
        "recall_all": float(whole.mean() / queries),
        "recall_middle": float(caught.sum() / mass.sum()) if mass.any() else 1.0,
        "recall_of_oracle": None,
        "worst_head": float(recall[far].min()) if far.any() else None,
        "needles_lost": float(lost / needles) if needles else None,
        "output_error": float(
            np.sum([r["output_error"] for r in members]) / np.sum([r["queries"] for r in members])
        ),
        "head_recall": np.round(np.nan_to_num(recall), 4).tolist(),
        "head_middle_mass": np.round(mass / queries, 4).tolist(),
        "queries": queries,
        "accuracy": None,
    }


def score_answers(members: list[dict]) -> dict:
    return {
        **NO_ATTENTION,
        "accuracy": float(np.mean([r["accuracy"] for r in members])),
        "prompts": len({r["unit"] for r in members}),
        "questions": len(members),
        "by_depth": [[r["depth"], r["accuracy"]] for r in members if r.get("depth") is not None],
    }


def score_text(members: list[dict]) -> dict:
    n_tokens = sum(r["tokens"] for r in members)
    score = {
        **NO_ATTENTION,
        "accuracy": None,
        "nll": sum(r["nll"] for r in members) / n_tokens,
        "texts": len(members),
    }
    if all("divergence" in r for r in members):  # dense was among the methods
        score["divergence"] = sum(r["divergence"] for r in members) / n_tokens
    return score


def score_drafting(members: list[dict]) -> dict:
    """Tokens that one verification gives, the one that it adds itself counted in."""
    done = sum(r["verifications"] for r in members)
    return {
        **NO_ATTENTION,
        "accuracy": None,
        "accepted_per_verification": 1 + sum(r["accepted"] for r in members) / done,
        "texts": len(members),
    }


def score_speed(members: list[dict]) -> dict:
    """Microseconds per layer and step: medians over the rounds of the mean over the layers.

    `speedup` is the median of the rounds' own ratios to dense, which took turns with the method.
    `break_even_tokens`: tokens to generate until the build is paid for; None where never.
    """
    rounds = {
        name: np.mean([r[f"{name}_us"] for r in members], 0)
        for name in ("route", "select", "attend", "other", "step", "dense")
    }
    median = {f"{name}_us": float(np.median(values)) for name, values in rounds.items()}
    build_ms = float(np.mean([r["build_ms"] for r in members]))
    saved_us = float(np.median(rounds["dense"] - rounds["step"]))
    return {
        **median,
        "speedup": float(np.median(rounds["dense"] / rounds["step"])),
        "build_ms": build_ms,
        "load": float(np.mean([r["load"] for r in members])),
        "break_even_tokens": 1e3 * build_ms / saved_us if saved_us > 0 else None,
        "recall_middle": None,
        "recall_of_oracle": None,
        "accuracy": None,
    }


MEASURES = {
    "attention": score_attention,
    "perplexity": score_text,
    "drafting": score_drafting,
    "speed": score_speed,
}


def add_difference_to_dense(scores: list[dict], records: list[dict]) -> None:
    """`to_dense: [difference, low, high]` of what tasks are judged by, paired over the units."""
    units = by_unit(records)
    dense = {
        (p[0], p[1], metric): found for (p, metric), found in units.items() if p[2] == "dense"
    }
    for score in scores:
        place = score["task"], score["context"], score["method"], score["budget"]
        for metric in ("accuracy", "nll", "accepted_per_verification"):
            own = units.get((place, metric))
            if own is None or (*place[:2], metric) not in dense or score["method"] == "dense":
                continue
            pairs = paired(dense[(*place[:2], metric)], own)
            if pairs is None:  # dense was measured on other units
                continue
            found = ratio_difference(*pairs)
            score["to_dense"] = [found.value, found.low, found.high]


def add_share_of_oracle(scores: list[dict]) -> None:
    def place(score):
        return score["task"], score["context"], score["budget"]

    oracle: dict[tuple, float] = {}
    for name in (
        "oracle",
        "oracle-tokens",
    ):  # that of single rows, where it was asked, is the best
        oracle |= {place(s): s.get("recall_middle") for s in scores if s["method"] == name}
    for score in scores:
        if score.get("recall_middle") is None:
            continue
        best = oracle.get(place(score))
        if best and score["method"] != "dense":
            score["recall_of_oracle"] = score["recall_middle"] / best


class Scores(list):
    """Scores of a run, a dict for each method, task, context and budget; a table in a notebook."""

    COLUMNS = (
        ("selectivity", "visited", "{:.1%}"),
        ("recall_middle", "recall", "{:.1%}"),
        ("needles_lost", "needles lost", "{:.2%}"),
        ("output_error", "output error", "{:.3f}"),
        ("accuracy", "answers", "{:.0%}"),
        ("nll", "nats", "{:.3f}"),
        ("divergence", "nats from dense", "{:.4f}"),
    )

    def _repr_html_(self) -> str:
        shown = [c for c in self.COLUMNS if any(s.get(c[0]) is not None for s in self)]
        head = ["method", "task", "context", "budget", *(title for _, title, _ in shown)]
        rows = [
            [
                s["method"], s["task"], f"{s['context']:,}", s["budget"],
                *("–" if s.get(k) is None else form.format(s[k]) for k, _, form in shown),
            ]
            for s in self
        ]  # fmt: skip
        return rows_table("saap eval", head, rows)


def read_scores(folder: Path) -> Scores:
    path = folder / SCORES
    return Scores(json.loads(path.read_text()) if path.is_file() else score_run(folder))
