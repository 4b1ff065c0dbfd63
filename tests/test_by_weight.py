"""Budgets by weight: found on some texts, judged on another, and what a layer's importance is."""

import dataclasses

import pytest
import torch

import saap
from saap.budget import Budget
from saap.eval import by_weight, reference
from saap.eval.cli.advise import print_by_weight
from saap.eval.tasks.base import text_tokens
from saap.methods import find_method

from .test_cli import run_cli

pytestmark = pytest.mark.many_steps

BUDGET = Budget(max_tokens=60, n_sink=4, window=32, flush_every=8)


@pytest.fixture(scope="module")
def model_and_texts(reference_model, reference_tokenizer):
    text = reference.split_held_out()[1]
    return reference_model, [
        text_tokens(reference_tokenizer, text, 1200, number, 3) for number in range(3)
    ]


def test_found_budgets_visit_as_many_rows_and_lose_less(model_and_texts):
    model, (*learned_from, judged) = model_and_texts
    method, seen = find_method("saap")(), []
    found = by_weight.learn(
        model, method, learned_from, BUDGET, n_tokens=10, progress=lambda *told: seen.append(told)
    )
    plain, best = found
    assert plain.layer_importance is None
    assert len(best.layer_importance) == 4
    assert all(budget.max_tokens == 360 for budget in found)
    assert [done for _, done, _ in seen] == list(range(10))
    measured = by_weight.measure(model, method, [judged], [BUDGET, *found], n_tokens=10)
    rows = [m.rows for m in measured]
    assert max(rows) < 1.35 * min(rows), rows
    assert measured[1].divergence < measured[0].divergence
    assert all(0 < m.divergence < 1 for m in measured)


def test_everything_diverges_from_nothing(model_and_texts):
    model, texts = model_and_texts
    whole = dataclasses.replace(BUDGET, max_tokens=2000)
    (found,) = by_weight.measure(model, find_method("saap")(), texts[:1], [whole], n_tokens=4)
    assert found.divergence < 1e-6


def test_importance_is_relative_and_bounded():
    sums = torch.tensor([1.0, 0.25, 0.0, 4.0, 1e6]).double()
    found = by_weight.importance(sums, [0, 1, 3])
    assert found[2] == found[4] == 1.0  # were not searched
    assert found[0] == pytest.approx(2 * found[1], abs=0.02)
    assert found[3] == pytest.approx(2 * found[0], abs=0.02)
    lopsided = by_weight.importance(torch.tensor([0.0, 1.0, 1e9]).double(), [0, 1, 2])
    assert (min(lopsided), max(lopsided)) == (0.25, 4.0)


def test_what_is_printed_is_a_budget_that_works(capsys, reference_model):
    budget = dataclasses.replace(
        BUDGET, max_tokens=360, min_weight=3e-4, layer_importance=(0.25, 4.0, 0.77, 3.27)
    )
    own = [by_weight.Measured(tried, 0.01, 90.0) for tried in (BUDGET, budget, budget)]
    print_by_weight(own, "saap", None)
    out = capsys.readouterr().out
    assert "min_weight, layers by importance" in out
    call = out[out.index("saap.Budget(") :]
    printed = eval(call[: call.rindex(")")], {"saap": saap})
    assert printed.layer_importance == budget.layer_importance
    with saap.attached(reference_model, method="saap", budget=printed) as attached:
        attached.cache()


@pytest.mark.bad_input
def test_one_text_cannot_judge_itself(monkeypatch, capsys):
    code, _, err = run_cli(monkeypatch, capsys, "advise", "reference", "--by-weight", "--texts", 1)
    assert code == 2
    assert "--by-weight needs --texts of at least 2" in err


@pytest.mark.bad_input
def test_a_method_that_follows_no_weight_is_refused_before_anything(monkeypatch, capsys):
    arguments = ("reference", "--by-weight", "--method", "quest")
    code, out, err = run_cli(monkeypatch, capsys, "advise", *arguments)
    assert (code, out) == (2, "")
    assert "got min_weight=1.0" in err


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_importance": (1.0, 0.0)}, r"must be numbers above 0, .* got \(1.0, 0.0\)"),
        ({"layer_importance": "11"}, "must be numbers above 0, one for each layer; got '11'"),
        ({"layer_importance": 2.0}, "must be numbers above 0, one for each layer; got 2.0"),
        ({"layer_importance": (1.0,), "min_weight": None}, "must be None without min_weight"),
    ],
)
def test_bad_importance(options, message):
    with pytest.raises(ValueError, match=message):
        Budget(**({"max_tokens": 9, "min_weight": 0.1} | options))


@pytest.mark.bad_input
def test_importance_of_another_model_is_refused(reference_model):
    budget = Budget(max_tokens=9, min_weight=0.1, layer_importance=(1.0, 2.0))
    with (
        pytest.raises(ValueError, match="must have 4 numbers, one for each layer; got 2"),
        saap.attached(reference_model, method="saap", budget=budget),
    ):
        pass
