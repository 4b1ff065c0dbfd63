"""The comparison of selectors: what it counts, and that its page is made from its records."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import refinement, selectors, selectors_page
from saap import hf
from saap.eval import reference
from saap.eval.tasks.answering import encode
from saap.kv.ranges import LOCAL
from saap.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
SHARE = 0.2


@pytest.fixture(scope="module")
def question(reference_model, reference_tokenizer):
    tokens = encode(reference_tokenizer, reference.split_held_out()[1][:1200])[:1024]
    read = hf.read_context(reference_model, tokens, n_queries=8)
    return selectors.Question(read, hf.model_layers(reference_model)[2].info, [SHARE])


def test_visited_rows_are_those_of_the_ranges():
    starts, lengths = torch.tensor([[[3, 0, 9]]]), torch.tensor([[[2, 1, 0]]])
    assert selectors.visited(starts, lengths, 6)[0, 0].tolist() == [1, 0, 0, 1, 1, 0]


@pytest.mark.parametrize("name", ["kmeans", "saap", "quest", "oracle-tokens"])
def test_recall_is_that_of_a_plain_count(question, reference_index, name):
    problem, budget = question.problem, question.budgets[SHARE]
    store = problem.store_for(METHODS[name](reference_index), budget)
    found = selectors.top_k_found(problem, store, budget, question.true)
    positions = problem.n_context + torch.arange(problem.n_queries)
    starts, lengths = store.select(problem.q_rope, problem.q_derope, budget, positions=positions)
    for query in range(problem.n_queries):
        for head in range(found.shape[1]):
            kv = head * problem.n_kv // found.shape[1]
            chosen = (t[query, kv, LOCAL:].tolist() for t in (starts, lengths))
            rows = [r for s, n in zip(*chosen, strict=True) for r in range(s, s + n)]
            rows = (store.rows.tokens[0, kv, rows] - problem.first).tolist()
            true = question.true[query, head].tolist()
            assert found[query, head] == pytest.approx(len(set(rows) & set(true)) / len(true))


def test_dense_finds_all(question, reference_index):
    (record,) = question.records(METHODS["dense"](reference_index))
    assert record["recall@100"] == 1
    assert record["middle_caught"] == pytest.approx(record["middle_mass"], rel=1e-5)
    assert record["bytes_choosing"] == 0


def test_refined_partitions(question, reference_index):
    records = refinement.partitions(question, reference_index)
    oracle = {r["partition"]: r for r in records if r["method"] == "oracle"}
    assert list(oracle) == [
        "as trained", "refined, 1 step", "refined, 3 steps", "refined, 10 steps", "from scratch",
    ]  # fmt: skip
    assert not [r for r in records if r["method"] == "mlp" and r["partition"] == "from scratch"]
    for record in records:
        assert record["middle_caught"] <= oracle[record["partition"]]["middle_caught"] + 1e-4
    assert reference_index.layers[2].n_segments > 1  # the index itself is as it was


RESULTS = sorted(ROOT.glob("benchmarks/results/*/selectors.json"))


@pytest.mark.skipif(not RESULTS, reason="no results")
def test_the_page_is_made_from_the_records():
    written = (ROOT / "docs" / "selectors.md").read_text()
    pages = []
    for path in RESULTS:
        report = json.loads(path.read_text())
        assert set(METHODS) <= {r["method"] for r in report["records"]}
        pages.append(selectors_page.page(report, path.parent.relative_to(ROOT).as_posix()))
    assert written in pages
