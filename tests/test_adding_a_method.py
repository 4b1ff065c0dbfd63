"""The example of the guide is a method: exact at full budget, different below, swept, reported."""

import re
from pathlib import Path

import pytest
import torch

from saap.budget import Budget
from saap.eval.arms import make_arms
from saap.eval.run import EvalConfig
from saap.eval.tasks.attention import LayerProblem, evaluate
from saap.methods import METHODS

from .test_methods import answer

GUIDE = Path(__file__).resolve().parents[1] / "docs" / "adding_a_method.md"


@pytest.fixture
def norms(monkeypatch):
    code = re.search(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)[1]
    assert len(code.splitlines()) < 40
    names: dict = {"__name__": "saap.methods.norms"}
    exec(compile(code, str(GUIDE), "exec"), names)
    monkeypatch.setitem(METHODS, "norms", names["Norms"])
    return names["Norms"]


@pytest.mark.parametrize("share", ["group", "head"])
def test_the_example_is_a_method(norms, captured, share):
    problem = LayerProblem(captured, 2, n_sink=16, window=32)
    n_middle = problem.stop - problem.first
    out, _, rows = answer(problem, norms(), Budget(max_tokens=n_middle, share=share))
    exact = problem.exact[0]
    assert (rows == n_middle).all()
    assert (out - exact).abs().max() <= 2e-6 * max(1.0, float(exact.abs().max()))
    out, _, rows = answer(problem, norms(), Budget(max_tokens=40, share=share))
    assert (rows == 40).all()
    assert not torch.equal(out, exact)


def test_the_example_is_swept(norms, reference_model, reference_tokenizer):
    from saap.eval import reference
    from saap.eval.tasks.base import text_tokens

    entry = {"name": "norms", "build": {"power": [1.0, -1.0]}}
    config = EvalConfig(methods=("dense", entry), contexts=(512,))
    arms = make_arms(config.methods, None, 0)
    assert [a.label for a in arms] == ["dense", "norms[power=1.0]", "norms[power=-1.0]"]
    tokens = text_tokens(reference_tokenizer, reference.split_held_out()[1], 512, 0, 1)
    points = [(a, a.points((0.3,), 504, "group")) for a in arms]
    records = evaluate(reference_model, tokens, points, 8)
    caught = {r["method"]: sum(r["middle_caught"]) for r in records if r["layer"] == 1}
    assert caught["norms[power=1.0]"] != caught["norms[power=-1.0]"]
    assert all(v <= caught["dense"] for v in caught.values())
