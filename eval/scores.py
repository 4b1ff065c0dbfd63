"""From raw records to scores: one object a (task, context, method, budget).

Recall of the middle is captured middle mass over middle mass, summed over queries and heads before
dividing, so that heads which never look far do not drown the few that do. `worst_head` is the
lowest recall among heads that hold at least 5 % of their mass in the middle.
"""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from saap.trained_index import write_atomically

from .records import read_run

SCORES = "scores.json"
FAR_HEAD_SHARE = 0.05


def score_run(folder: Path) -> list[dict]:
    """Score a result folder and write `scores.json` into it."""
    run, records = read_run(folder)
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for record in records:
        key = (record["task"], record["context"], record["method"], record["budget"])
        groups[key].append(record)
    scores = []
    for (task, context, method, budget), members in groups.items():
        measure = score_attention if task == "attention" else score_answers
        scores.append(
            {
                "method": method,
                "model": run["model"],
                "task": task,
                "context": context,
                "budget": budget,
                **mean_costs(members),
                **measure(members),
            }
        )
    add_share_of_oracle(scores)
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
    with np.errstate(invalid="ignore", divide="ignore"):
        recall = np.where(mass > 0, caught / mass, np.nan)
    far = mass / queries >= FAR_HEAD_SHARE
    return {
        "recall_all": float(whole.mean() / queries),
        "recall_middle": float(caught.sum() / mass.sum()),
        "recall_of_oracle": None,
        "worst_head": float(recall[far].min()) if far.any() else None,
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
        "recall_all": None,
        "recall_middle": None,
        "recall_of_oracle": None,
        "output_error": None,
        "accuracy": float(np.mean([r["accuracy"] for r in members])),
        "prompts": len(members),
    }


def add_share_of_oracle(scores: list[dict]) -> None:
    def place(score):
        return score["task"], score["context"], score["budget"]

    oracle = {place(s): s["recall_middle"] for s in scores if s["method"] == "oracle"}
    for score in scores:
        best = oracle.get(place(score))
        if best and score["recall_middle"] is not None and score["method"] != "dense":
            score["recall_of_oracle"] = score["recall_middle"] / best


def read_scores(folder: Path) -> list[dict]:
    path = folder / SCORES
    return json.loads(path.read_text()) if path.is_file() else score_run(folder)
