"""`saap advise`: what is recommended from what was measured, and the command."""

import pytest

from saap.budget import Budget
from saap.eval.advise import Advice, Measured, possible

from .test_cli import run_cli

pytestmark = pytest.mark.many_steps


def measured(share, errors, speedup):
    budget = Budget(max_tokens=round(1000 * share), window=64)
    mean = sum(errors) / len(errors)
    return Measured(share, budget, 0.9, 0.01, mean, dict(enumerate(errors)), 10.0, speedup)


def test_the_smallest_share_below_the_target_is_chosen():
    own = [measured(0.05, [0.2, 0.2], 3.0), measured(0.1, [0.05, 0.05], 2.0)]
    own.append(measured(0.2, [0.01, 0.01], 0.9))
    assert Advice(4096, 0.1, 20.0, 30.0, own).chosen.share == 0.1
    assert Advice(4096, 0.1, 20.0, 30.0, own).pays
    assert not Advice(4096, 0.02, 20.0, 30.0, own).pays
    assert Advice(4096, 0.001, 20.0, 30.0, own).chosen is None
    assert not Advice(4096, 0.001, 20.0, 30.0, own).pays


def test_layers_that_stand_out_are_named():
    own = [measured(0.1, [0.02, 0.02, 0.3, 0.02], 2.0)]
    assert Advice(4096, 0.1, 20.0, 30.0, own).hard_layers == (2,)


def test_shares_that_sinks_and_window_fill_are_left_out():
    assert possible(8192) == (0.02, 0.05, 0.1, 0.2, 0.3)
    assert possible(1024) == (0.05, 0.1, 0.2, 0.3)
    with pytest.raises(ValueError, match=r"context must be so long that 30% of it .* got 64"):
        possible(64)


def test_the_command_measures_and_recommends(monkeypatch, capsys):
    code, out, err = run_cli(
        monkeypatch, capsys, "advise", "reference", "--context", 1024, "--texts", 1, "--error", 0.5
    )
    assert code == 0, err
    assert "saap at 1,024 tokens" in out
    assert "saap.attached(model, method='saap', budget=saap.Budget(" in out


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--error", 0), "--error must be above 0 and at most 2; got 0"),
        (("--texts", 0), "--texts must be in 1..64; got 0"),
        (("--context", 10**6), "context must be at most the model's"),
        (("--context", 100), "context must be at least 256; got 100"),
        (("--method", "quickest"), "quickest"),
    ],
)
def test_bad_input(arguments, message, monkeypatch, capsys):
    code, _, err = run_cli(monkeypatch, capsys, "advise", "reference", *arguments)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
