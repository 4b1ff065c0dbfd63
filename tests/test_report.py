"""Pictures of reports: fronts, labels that can be read, bounds in every picture."""

import itertools

import numpy as np
import pytest

from saap.eval.report import fronts, page, plots
from saap.methods import METHODS

BUDGETS = (0.05, 0.1, 0.2)


def scores(methods=tuple(METHODS), contexts=(1024, 8192)):
    rows = []
    for context in contexts:
        for number, method in enumerate(methods):
            for budget in BUDGETS:
                shared = {"method": method, "context": context, "budget": str(budget),
                          "selectivity": budget, "bytes_read": 1e6 * budget + number,
                          "router_bytes": 10, "recall_of_oracle": None}  # fmt: skip
                heads = {"head_recall": [[0.5, 0.1]], "head_middle_mass": [[0.5, 0.0]]}
                rows.append({**shared, **heads, "task": "attention", "worst_head": 0.1,
                             "recall_middle": budget + number / 50, "recall_all": 0.9,
                             "needles_lost": 0.01, "output_error": 0.5 - budget})  # fmt: skip
                for task in ("passkey", "multi-key"):
                    rows.append({**shared, "task": task, "accuracy": budget + number / 50,
                                 "by_depth": [[d / 10, 1.0] for d in range(10)]})  # fmt: skip
    return rows


def test_every_method_has_its_own_colour():
    shades = [plots.color(m) for m in METHODS if m not in ("dense", "oracle")]
    assert len(set(shades)) == len(shades)
    assert plots.color("pq[bits=4]") == plots.color("pq")


@pytest.mark.parametrize("count", [1, 2, 10, 30])
def test_labels_are_apart_and_in_order(count):
    rng = np.random.default_rng(count)
    heights = sorted(rng.uniform(0.4, 0.6, count).tolist())
    places = fronts.spread(heights, 0.04)
    assert all(b - a >= 0.04 - 1e-9 for a, b in itertools.pairwise(places))
    assert max(places) <= 1.0
    if count <= 10:
        assert places[0] == heights[0]  # there is room above, so none is pushed down


def test_the_front_is_what_no_other_method_beats():
    found = {
        "saap": np.array([[1, 0.5], [2, 0.8]]), "quest": np.array([[1, 0.6], [3, 0.7]]),
        "oracle": np.array([[1, 0.9]]), "random": np.array([[0.5, 0.95]]),
    }  # fmt: skip
    assert fronts.front_of(found, 1).tolist() == [[1, 0.6], [2, 0.8]]
    assert fronts.front_of(found, -1).tolist() == [[1, 0.5]]


def test_every_picture_is_made(tmp_path):
    made = page.make_plots(scores(), [], tmp_path)
    assert set(made) == {
        "recall", "recall_bytes", "error_bytes", "heads", "accuracy-passkey", "accuracy-multi-key",
        "answers", "depths-passkey", "depths-multi-key",
    }  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made.values())
    assert all(name.split("-")[0] in page.CAPTIONS for name in made)


def test_one_budget_is_no_line(tmp_path):
    own = [s for s in scores(contexts=(1024,)) if s["budget"] == "0.05"]
    assert set(page.make_plots(own, [], tmp_path)) == {
        "heads", "answers", "depths-passkey", "depths-multi-key",
    }  # fmt: skip


def test_grids_show_the_bounds():
    own = [s for s in scores() if s["task"] == "passkey"]
    names = page.grid_methods(own)
    assert names[0] == "dense"
    assert {"oracle", "saap"} <= set(names[:4])
    assert names[-1] == "random"
    assert len(names) == 6


def test_the_budget_is_spelled_out():
    run = {"attention_rows": {"8192": {"context": 8128, "sinks": 16, "window": 254}}}
    note = page.budget_note(8192, "0.05", run)
    assert "406 of 8,128 rows" in note
    assert "16 sinks, 254 of the recent window, and 136 of the middle" in note
    assert page.budget_note(1024, "0.05", run).startswith("kB are the keys and values")
