"""Every method: exact at full budget, different below it, monotone in the budget."""

import dataclasses

import pytest
import torch

from saap import hf
from saap.budget import Budget
from saap.eval.tasks.attention import LayerProblem
from saap.methods import METHODS, find_method

LAYER = 2
LAYOUT = Budget(max_tokens=0, n_sink=16, window=32, flush_every=1)
# Methods that visit whole buckets, of which there are `index.nlist`, and those that visit cells.
BUCKETED = ["random", "kmeans-rope", "kmeans", "linear", "mlp", "moments"]
CELLED = ["oracle", "kmeans-cells", "blend"]


def problem_of(model, captured):
    """1016 tokens of context, of which 968 are in the middle, and 8 queries."""
    return LayerProblem(captured, hf.model_layers(model)[LAYER].info, LAYOUT)


@pytest.fixture(scope="module")
def problem(reference_model, captured):
    own = problem_of(reference_model, captured)
    assert own.stop - own.first == own.n_context - 16 - 32 == 968
    return own


def answer(problem, method, budget):
    """`out, lse` of the method, and the rows of the middle it visits `[n, H]`."""
    budget = dataclasses.replace(budget, n_sink=16, window=32, flush_every=1)
    out, lse, *_, lengths = problem.attend(problem.store_for(method, budget), budget)
    return out, lse, lengths.sum(-1)


@pytest.mark.parametrize("share", ["group", "head"])
@pytest.mark.parametrize("name", METHODS)
def test_full_budget_equals_dense(problem, reference_index, name, share):
    method = find_method(name)(reference_index)
    budget = Budget(max_tokens=problem.stop - problem.first, share=share)
    out, lse, rows = answer(problem, method, budget)
    exact_out, exact_lse = problem.exact
    assert (rows == problem.stop - problem.first).all()
    # float32 sums in another order: a few units in the last place of values near 1.
    assert (out - exact_out).abs().max() <= 2e-6 * max(1.0, float(exact_out.abs().max()))
    assert (lse - exact_lse).abs().max() <= 2e-6 * max(1.0, float(exact_lse.abs().max()))


@pytest.mark.parametrize("name", BUCKETED + CELLED)
def test_nprobe_nlist_equals_dense(problem, reference_index, name):
    method = find_method(name)(reference_index)
    cells = reference_index.layers[0].n_segments if name in CELLED else 1
    out, _, rows = answer(problem, method, Budget(nprobe=reference_index.nlist * cells))
    assert (rows == problem.stop - problem.first).all()
    exact = problem.exact[0]
    assert (out - exact).abs().max() <= 2e-6 * max(1.0, float(exact.abs().max()))


@pytest.mark.parametrize("name", [m for m in METHODS if m != "dense"])
def test_small_budget_changes_the_output_and_is_kept(problem, reference_index, name):
    method = find_method(name)(reference_index)
    out, _, rows = answer(problem, method, Budget(max_tokens=40))
    assert (rows == 40).all()
    assert not torch.equal(out, problem.exact[0])


@pytest.mark.parametrize("share", ["group", "head"])
@pytest.mark.parametrize("name", METHODS)
def test_larger_budget_never_lowers_recall(problem, reference_index, name, share):
    previous = torch.full_like(problem.exact[1], -torch.inf)
    for max_tokens in (10, 40, 160, 640):
        # a new method each time: the random one draws anew from its seed
        method = find_method(name)(reference_index, seed=1)
        budget = Budget(max_tokens=max_tokens, share=share)
        _, lse, _ = answer(problem, method, budget)
        assert (lse >= previous - 1e-5).all()
        previous = lse


@pytest.mark.parametrize("share", ["group", "head"])
def test_nothing_beats_the_oracle(problem, reference_index, share):
    """Neither in as many cells, nor whole buckets in the cells that make them up."""

    def caught(name, budget):
        _, lse, _ = answer(problem, find_method(name)(reference_index), budget)
        mass = (lse - problem.exact[1]).exp()
        if share == "group":
            mass = mass.unflatten(1, (problem.n_kv, -1)).sum(-1)
        return mass

    best = caught("oracle", Budget(nprobe=4, share=share))
    for name in ("blend", "kmeans-cells"):
        assert (caught(name, Budget(nprobe=4, share=share)) <= best + 1e-5).all(), name
    for name in ("random", "kmeans", "linear", "mlp"):
        mass = caught(name, Budget(nprobe=4, share=share))
        # Four buckets are 64 cells.
        assert (mass <= caught("oracle", Budget(nprobe=64, share=share)) + 1e-5).all(), name


def test_unknown_method_names_the_nearest():
    with pytest.raises(
        ValueError, match=r"method must be one of .*; got 'sap' .did you mean 'saap'"
    ):
        find_method("sap")


def test_method_without_index():
    with pytest.raises(ValueError, match="'mlp' needs a trained index"):
        find_method("mlp")(None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one of nprobe, max_tokens, top_p, min_weight must be set; got none"),
        ({"nprobe": 0}, "nprobe must be an integer of at least 1; got 0"),
        ({"max_tokens": -1}, "max_tokens must be .*; got -1"),
        ({"nprobe": 1, "window": 0}, "window must be .*; got 0"),
        ({"nprobe": 1, "share": "all"}, "share must be 'group' or 'head'; got 'all'"),
    ],
)
def test_bad_budgets(options, message):
    with pytest.raises(ValueError, match=message):
        Budget(**options)


def test_budget_for_selectivity_counts_sinks_and_window():
    budget = Budget.for_selectivity(0.05, 8000, n_sink=16, window=250)
    # What has left the window since the last flush is visited in any case.
    assert budget.max_tokens == 400 - 16 - 250 - (8000 - 16 - 250) % 16
    with pytest.raises(ValueError, match=r"above 0\.0340, .* take 272 rows of 8000"):
        Budget.for_selectivity(0.03, 8000, n_sink=16, window=250)


def test_nprobe_above_nlist(problem, reference_index):
    assert reference_index.nlist * reference_index.layers[0].n_segments == 512
    with pytest.raises(ValueError, match=r"nprobe must be in 1\.\.512; got 513"):
        answer(problem, find_method("blend")(reference_index), Budget(nprobe=513))
    with pytest.raises(ValueError, match=r"nprobe must be in 1\.\.32; got 33"):
        answer(problem, find_method("mlp")(reference_index), Budget(nprobe=33))
