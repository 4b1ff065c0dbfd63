"""The comparison of all methods: its tables, and that its page is made from its results."""

import json
from pathlib import Path

import pytest

from benchmarks import real_models, refinement, selectors
from saap import hf
from saap.budget import Budget
from saap.eval import reference
from saap.eval.tasks.answering import encode
from saap.eval.tasks.attention import LayerProblem, layout_of
from saap.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]


def score(method, budget, recall, nbytes, **more):
    return {
        "task": "attention", "method": method, "budget": budget, "recall_middle": recall,
        "output_error": 0.1, "bytes_read": nbytes, "router_bytes": 1e5, "queries": 64, **more,
    }  # fmt: skip


SCORES = [
    score("dense", "1", 1.0, 6e6),
    score("saap", "0.02", 0.6, 4e5),
    score("saap", "0.05", 0.8, 6e5, output_error=0.05, needles_lost=0.00012),
    score("quest", "0.02", 0.2, 5e5),
    score("quest", "0.05", 0.4, 7e5),
    score("oracle", "0.05", 0.7, 4e5),
    {"task": "passkey", "method": "saap", "budget": "0.05", "accuracy": 0.75, "questions": 24,
     "prompts": 6},
    {"task": "perplexity", "method": "saap", "budget": "0.05", "divergence": 0.0012, "texts": 3},
]  # fmt: skip


def test_at_equal_rows_the_best_comes_first():
    found = selectors.of_rows(SCORES).splitlines()
    assert [line.split(" | ")[0] for line in found[2:]] == [
        "| `dense`", "| `saap`", "| `oracle`", "| `quest`"
    ]  # fmt: skip
    assert found[3] == (
        "| `saap` | 75% | 0.0012 | 100 | 60.0% | – | 0.100 | 400 | 80.0% | 0.012% | 0.050 | 600 |"
    )
    assert found[4].startswith(
        "| `oracle` | – | – | – |"
    )  # what it reads to choose is not counted


def test_at_equal_bytes_it_is_between_what_was_measured():
    found = selectors.by_share(SCORES, "attention")

    def recall(method, kilobytes):
        return selectors.at_bytes(found, method, "recall_middle", kilobytes)

    assert recall("saap", 400) == pytest.approx(0.6)
    assert recall("saap", 600) == pytest.approx(0.8)
    assert recall("saap", (400 * 600) ** 0.5) == pytest.approx(0.7)
    assert recall("saap", 399) is None
    assert recall("oracle", 400) is None  # one share alone
    assert selectors.of_bytes(SCORES).splitlines()[2:] == [
        "| `saap` | – | – | 60.0% | 0.100 | 80.0% | 0.050 | – | – |",
        "| `quest` | – | – | – | – | 30.8% | 0.100 | – | – |",
    ]


def test_refined_partitions(reference_model, reference_tokenizer, reference_index):
    tokens = encode(reference_tokenizer, reference.split_held_out()[1][:1200])[:1024]
    read = hf.read_context(reference_model, tokens, n_queries=8)
    budget = Budget.for_selectivity(0.2, 1016, window=1016 // 32, estimate_rest=False)
    info = hf.model_layers(reference_model)[2].info
    problem = LayerProblem(read, info, layout_of(budget))
    records = refinement.partitions(problem, budget, reference_index)
    oracle = {r["partition"]: r for r in records if r["method"] == "oracle"}
    assert list(oracle) == [
        "as trained", "refined, 1 step", "refined, 3 steps", "refined, 10 steps", "from scratch",
    ]  # fmt: skip
    assert not [r for r in records if r["method"] == "mlp" and r["partition"] == "from scratch"]
    for record in records:
        assert record["middle_caught"] <= oracle[record["partition"]]["middle_caught"] + 1e-4
    assert reference_index.layers[2].n_segments > 1  # the index itself is as it was
    last = refinement.table(records).splitlines()[-1]
    assert last.startswith("| from scratch |")
    assert last.endswith(" | – |")


def run_of(text, *scores, seed=0):
    own = [{"context": 4096, "task": "passkey", **score} for score in scores]
    return {"model": "m", "chat": False, "text": text, "config": {"seed": seed}, "scores": own}


def test_a_later_run_replaces_scores_and_those_of_another_text():
    saap, pq = ({"method": name, "budget": "0.05"} for name in ("saap", "pq"))
    elsewhere = {**saap, "context": 8192}
    first = run_of("a", saap, pq, elsewhere)
    assert real_models.latest([first, run_of("a", pq)]) == [
        run_of("a", saap, elsewhere), run_of("a", pq)
    ]  # fmt: skip
    assert real_models.latest([first, run_of("a", pq, seed=1)]) == [first, run_of("a", pq, seed=1)]
    assert real_models.latest([first, run_of("b", pq)]) == [
        run_of("a", elsewhere),
        run_of("b", pq),
    ]


@pytest.mark.parametrize("made_by", [selectors, real_models])
def test_the_page_is_made_from_the_records(made_by):
    name = made_by.COMMAND.rsplit(".", 1)[1]
    runs = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["runs"]
    assert made_by.tables(runs) in made_by.PAGE.read_text()
    assert real_models.latest(runs) == runs
    if made_by is selectors:
        names = {s["method"].split("[")[0] for run in runs for s in run["scores"]}
        assert set(METHODS) <= names
