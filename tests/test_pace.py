"""How many tokens are drafted: as many as pay, and never much slower than exact steps."""

import random

import pytest

from saap.hf.pace import Pace, Verify


def simulated(draft, verification, exact, share, n_tokens=600, verify=8, noise=0.1):
    """Seconds per token over those of exact steps, and the numbers of drafts chosen late.

    Seconds: `draft` of a step, `verification(n)` of n tokens, `exact` of an exact step. `share`:
    of drafts that are right.
    """
    chance = random.Random(0)
    pace, spent, done, late = Pace(Verify(verify)), 0.0, 0, []

    def about(seconds):
        return seconds * (1 + noise * chance.random())

    while done < n_tokens:
        n = pace.choose(n_tokens - done - 1)
        drafts = [about(draft) for _ in range(n)]
        took = about(verification(n + 1) if n else exact)
        right = next((i for i in range(n) if chance.random() >= share), n)
        pace.took(drafts, took, min(right + 1, n), right)
        spent += sum(drafts) + took
        done += right + 1
        if done > n_tokens / 2:
            late.append(n)
    return spent / done / exact, late


def test_cheap_good_drafts_are_many():
    ratio, late = simulated(0.1, lambda n: 1 + 0.02 * n, 1.0, 0.95)
    assert ratio < 0.5
    assert sum(late) / len(late) > 5


def test_bad_drafts_are_few():
    many = simulated(0.1, lambda n: 1 + 0.02 * n, 1.0, 0.95)[1]
    few = simulated(0.1, lambda n: 1 + 0.02 * n, 1.0, 0.5)[1]
    assert sum(few) / len(few) < sum(many) / len(many) - 2


@pytest.mark.parametrize(
    ("draft", "slope", "share"), [(1.0, 0.5, 0.95), (0.9, 0.0, 0.3), (0.5, 1.0, 0.0), (2, 2, 0.9)]
)
def test_never_much_slower_than_exact_steps(draft, slope, share):
    ratio, late = simulated(draft, lambda n: 1 + slope * n, 1.0, share)
    # Of these, up to 0.05 are the noise, 0.03 the first rounds.
    assert ratio < 1.13
    assert late.count(0) > 0.8 * len(late)


def test_without_adapting_always_as_many():
    pace = Pace(Verify(5, adapt=False))
    assert [pace.choose(most) for most in (9, 5, 3, 0, -1)] == [5, 5, 3, 0, 0]


def test_counts():
    pace = Pace(Verify(3))
    assert pace.tally.accepted_per_verification == 1.0
    pace.took([], 1.0, 0, 0)
    pace.took([0.1] * 3, 1.0, 2, 1)
    pace.took([0.1] * 2, 1.0, 2, 2)
    tally = pace.tally
    assert (tally.exact_steps, tally.verifications, tally.drafted, tally.accepted) == (1, 2, 5, 3)
    assert tally.accepted_per_verification == 2.5
    assert tally.acceptance == 0.6
