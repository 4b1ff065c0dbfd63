"""Lossless decoding that samples has the distribution of dense attention."""

import copy

import pytest
import torch

from saap.hf import Verify, lossless, over

from .lossless_cases import attached, inputs_of, small_llama
from .test_generate import generated, prompt

pytestmark = pytest.mark.many_steps


@pytest.fixture(scope="module")
def llama():
    return small_llama()


def test_sampled_batches_have_the_distribution_of_dense(llama):
    """Pairs of tokens of `num_return_sequences`, where other sequences cut what was accepted."""
    from scipy.stats import chisquare

    model, index = llama
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight *= 6
    inputs, n_runs, n_each = inputs_of(prompt(1, 60, seed=1)), 150, 4
    options = {"do_sample": True, "top_k": 3, "max_new_tokens": 3, "eos_token_id": None}
    options["pad_token_id"] = 0
    torch.manual_seed(0)
    counts = {}
    with attached(model, index, verify=Verify(2, adapt=False)) as saap_model:
        for _ in range(n_runs):
            cache = saap_model.cache()
            found = model.generate(**inputs, **over(cache), num_return_sequences=n_each, **options)
            for three in found[:, 60:].tolist():
                counts[tuple(three)] = counts.get(tuple(three), 0) + 1
    shares = {(): 1.0}
    for _ in range(3):
        ids = torch.cat(
            [
                inputs["input_ids"].expand(len(shares), -1),
                torch.tensor(list(shares), dtype=torch.long),
            ],
            1,
        )
        with torch.no_grad():
            best = model(ids).logits[:, -1].topk(3)
        own = best.values.softmax(-1)
        shares = {
            (*before, int(best.indices[b, i])): share * float(own[b, i])
            for b, (before, share) in enumerate(shares.items())
            for i in range(3)
        }
    assert set(counts) <= set(shares)
    n = n_runs * n_each
    often = [key for key, share in shares.items() if share * n >= 5]
    seen = [counts.get(key, 0) for key in often]
    expected = [shares[key] * n for key in often]
    if n - sum(expected) > 1:
        seen.append(n - sum(seen))
        expected.append(n - sum(expected))
    assert len(often) > 5
    total = sum(expected)
    assert chisquare(seen, [e * n / total for e in expected]).pvalue > 1e-3


def test_the_rule_of_acceptance_has_the_exact_distribution():
    from scipy.stats import chisquare

    torch.manual_seed(0)
    exact, drafted = (torch.randn(2, 8) * 1.5).softmax(-1)
    drafted[3], exact[5] = 0.0, 0.0
    exact, drafted = exact / exact.sum(), drafted / drafted.sum()
    counts = torch.zeros(8)
    for _ in range(10_000):
        counts[lossless.accepted_or_drawn(lossless.drawn(drafted), exact, drafted)] += 1
    assert counts[5] == 0
    seen = exact > 0
    found = chisquare(
        counts[seen].double(), exact[seen].double() / exact[seen].double().sum() * 1e4
    )
    assert found.pvalue > 1e-3


@pytest.mark.parametrize("always_accepts", [False, True])
def test_sampled_tokens_have_the_distribution_of_dense(llama, monkeypatch, always_accepts):
    """Where the drafts' distribution has more than dense's, emitted tokens must not have more.

    Each token's place in the order of `drafted / exact` is uniform under the distribution of
    dense, given all tokens before it. The control shows that the test would see what is wrong.
    """
    from scipy.stats import chisquare

    model, index = llama
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight *= 6
    calls = []
    rule = lossless.accepted_or_drawn

    def recorded(draft, exact, drafted):
        token = draft if always_accepts else rule(draft, exact, drafted)
        calls.append((token, exact, drafted))
        return token

    monkeypatch.setattr(lossless, "accepted_or_drawn", recorded)
    options = {"do_sample": True, "temperature": 0.9, "top_k": 20, "max_new_tokens": 150}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    scores, bins = [], torch.zeros(8)
    with attached(model, index, verify=Verify(2, adapt=False)) as saap_model:
        for seed in range(4):
            found = generated(
                model, inputs_of(prompt(1, 60, seed=seed)),
                **over(saap_model.cache()), **options,
            )  # fmt: skip
            scores.append((found.sequences, found.scores))
    for token, exact, drafted in calls:
        order = (drafted / exact.clamp(min=1e-30)).argsort()
        place = int((order == token).nonzero())
        below = float(exact[order[:place]].sum())
        at = min(0.999999, below + float(torch.rand(())) * float(exact[token]))
        bins[int(8 * at)] += 1
    assert len(calls) > 250
    p = chisquare(bins.numpy()).pvalue
    assert p < 1e-6 if always_accepts else p > 1e-3
    # And the distribution that was compared with is that of a dense forward.
    ids, own = scores[0]
    with torch.no_grad():
        dense = model(ids).logits[0, 59:-1]
    place = len(own) // 2
    kept = own[place][0].isfinite()
    assert int(kept.sum()) == 20
    assert torch.allclose(own[place][0][kept], dense[place][kept] / 0.9, atol=1e-2)
