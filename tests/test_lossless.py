"""Lossless decoding: what `generate()` gives is dense's, and the cache holds what was accepted."""

import pytest
import torch
from transformers import StoppingCriteria

from saap.hf import over
from saap.kv.middle_rows import MiddleRows

from .lossless_cases import (
    METHODS,
    NEW,
    assert_batch_holds,
    assert_holds,
    attached,
    batch_of,
    inputs_of,
    small_llama,
)
from .test_generate import generated, make, prompt, random_index

pytestmark = pytest.mark.many_steps


@pytest.fixture(scope="module")
def llama():
    return small_llama()


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma2", "smollm3", "gpt_oss"])
def test_greedy_tokens_are_those_of_dense(family):
    model = make(family)
    index = random_index(model)
    drafted = accepted = 0
    for seed in range(5):
        inputs = inputs_of(prompt(1, 60, seed=seed))
        expected = generated(model, inputs, max_new_tokens=NEW)
        with attached(model, index) as saap_model:
            cache = saap_model.cache()
            ours = generated(model, inputs, **over(cache), max_new_tokens=NEW)
        assert torch.equal(ours, expected)
        drafted += cache.pace.tally.drafted
        accepted += cache.pace.tally.accepted
    assert accepted
    if family != "smollm3":  # its random model says the same everywhere
        assert accepted < drafted, "some drafts are cut off again"
    assert_holds(model, cache, ours)
    assert "generate" not in vars(model)


@pytest.mark.parametrize("method", METHODS)
def test_any_method_drafts(llama, method):
    model, index = llama
    inputs = inputs_of(prompt(1, 560 if method == "saap" else 60, seed=11))
    expected = generated(model, inputs, max_new_tokens=NEW)
    with attached(model, index if method == "kmeans" else None, METHODS[method], method) as own:
        cache = own.cache()
        ours = generated(model, inputs, **over(cache), max_new_tokens=NEW)
    assert torch.equal(ours, expected)
    assert 0 < cache.pace.tally.accepted < cache.pace.tally.drafted
    assert_holds(model, cache, ours)


@pytest.mark.parametrize("method", ["streaming", "kmeans"])
def test_drafts_never_move_rows(llama, monkeypatch, method):
    """A flush that counted drafts would be undone with them."""
    model, index = llama
    monkeypatch.setattr(MiddleRows, "_lay_out", lambda *_: pytest.fail("rows moved back"))
    with attached(model, index, METHODS[method], method) as saap_model:
        cache = saap_model.cache()
        ours = generated(model, inputs_of(prompt(1, 60)), **over(cache))
    assert_holds(model, cache, ours)
    assert cache.layers[0].store.middles[0] > 60 - 4 - 8


@pytest.mark.parametrize("length", [1, 3, 12])
def test_short_prompts(llama, length):
    model, index = llama
    inputs = inputs_of(prompt(1, length))
    with attached(model, index) as saap_model:
        cache = saap_model.cache()
        ours = generated(model, inputs, **over(cache), max_new_tokens=20)
        assert torch.equal(ours, generated(model, inputs, max_new_tokens=20))
    assert_holds(model, cache, ours)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_left_padding_and_the_next_turn(family):
    model = make(family)
    model.set_attn_implementation("eager")
    tokens = prompt(1, 50)
    with attached(model, random_index(model)) as saap_model:
        cache = saap_model.cache()
        for turn, padding in enumerate([7, 7, 7]):
            inputs = inputs_of(tokens, padding)
            ours = generated(model, inputs, **over(cache), max_new_tokens=9)
            assert torch.equal(ours, generated(model, inputs, max_new_tokens=9))
            assert_holds(model, cache, ours, padding)
            # One token more than the cache holds, then several: a prompt is read exactly.
            tokens = torch.cat([ours, prompt(1, 1 + 8 * turn, seed=turn)], 1)


LENGTHS = [60, 41, 53]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_batch_and_its_next_turn(family):
    """Greedy tokens of a left-padded batch, and its cache, are those of each sequence alone."""
    model = make(family)
    model.set_attn_implementation("eager")
    inputs, lengths = batch_of(LENGTHS, seed=3), list(LENGTHS)
    with attached(model, random_index(model)) as saap_model:
        cache = saap_model.cache()
        for turn in range(2):
            width = inputs["input_ids"].shape[1]
            ours = generated(model, inputs, **over(cache), max_new_tokens=12)
            assert torch.equal(ours, generated(model, inputs, max_new_tokens=12))
            assert_batch_holds(model, cache, ours, lengths, width)
            more = torch.cat([ours, prompt(len(LENGTHS), 1 + turn, seed=9)], 1)
            new = inputs["attention_mask"].new_ones(len(LENGTHS), more.shape[1] - width)
            lengths = [n + new.shape[1] for n in lengths]
            inputs = {
                "input_ids": more,
                "attention_mask": torch.cat([inputs["attention_mask"], new], 1),
            }
    tally = cache.pace.tally
    assert 0 < tally.accepted < tally.drafted


def test_a_sequence_of_a_batch_ends_at_every_place_of_a_draft(llama):
    model, index = llama
    inputs = batch_of(LENGTHS, seed=3)
    dense = generated(model, inputs, max_new_tokens=30, eos_token_id=None)
    with attached(model, index) as saap_model:
        for n in (1, 3, 5, 8):
            options = {"max_new_tokens": 30, "eos_token_id": int(dense[1, 59 + n])}
            expected = generated(model, inputs, **options)
            cache = saap_model.cache()
            ours = generated(model, inputs, **over(cache), **options)
            assert torch.equal(ours, expected)
            assert_batch_holds(model, cache, ours, LENGTHS, 60)
            ends = (expected[:, 60:] == options["eos_token_id"]).int()
            places = torch.where(ends.any(1), ends.argmax(1), expected.shape[1])
            assert places[1] < places.max(), "one ends, and others go on"


class StopsOne(StoppingCriteria):
    """The first sequence is finished after so many tokens."""

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **_):
        stopped = torch.zeros(len(input_ids), dtype=torch.bool)
        stopped[0] = input_ids.shape[1] >= self.length
        return stopped


@pytest.mark.parametrize("eos", [None, 1])
def test_a_sequence_of_a_batch_that_is_stopped(llama, eos):
    """Padding follows where there is a token that ends sequences, else tokens as before."""
    model, index = llama
    inputs = batch_of(LENGTHS, seed=3)
    options = {"max_new_tokens": 14, "eos_token_id": eos}
    for n in (62, 64):
        options["stopping_criteria"] = [StopsOne(n)]
        expected = generated(model, inputs, **options)
        with attached(model, index) as saap_model:
            cache = saap_model.cache()
            ours = generated(model, inputs, **over(cache), **options)
        assert torch.equal(ours, expected)
        assert bool((ours[0, n:] == 0).all()) == (eos is not None)
        assert_batch_holds(model, cache, ours, LENGTHS, 60)


def test_adapting_gives_the_same_tokens(llama):
    model, index = llama
    inputs = inputs_of(prompt(1, 60, seed=2))
    with attached(model, index, verify=8) as saap_model:
        cache = saap_model.cache()
        ours = generated(model, inputs, **over(cache), max_new_tokens=60)
        assert torch.equal(ours, generated(model, inputs, max_new_tokens=60))
    assert cache.pace.tally.exact_steps >= 2
