"""Lossless decoding: what `generate()` gives is dense's, and the cache holds what was accepted."""

import copy

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import saap
from saap.budget import Budget
from saap.hf import Verify, lossless
from saap.kv.middle_rows import MiddleRows

from .test_generate import SMALL, generated, make, prompt, random_index

FIXED = Verify(4, adapt=False)
NEW = 24


@pytest.fixture(scope="module")
def llama():
    model = make("llama")
    return model, random_index(model)


def inputs_of(tokens, padding=0):
    mask = (torch.arange(tokens.shape[1]) >= padding)[None].long()
    return {"input_ids": tokens, "attention_mask": mask}


def attached(model, index=None, budget=SMALL, method="blend", verify=FIXED):
    return saap.attached(model, index, budget, method=method, verify=verify)


class Kept(BaseStreamer):
    """Keeps what is streamed; may break off after so many tokens."""

    def __init__(self, most=None):
        self.tokens, self.most = [], most

    def put(self, value):
        self.tokens.append(value.flatten().tolist())
        if len(self.tokens) - 1 == self.most:
            raise KeyboardInterrupt

    def end(self):
        self.tokens.append("end")


def batch_of(lengths, seed=0):
    """Prompts of these lengths, padded on the left."""
    width = max(lengths)
    mask = torch.stack([(torch.arange(width) >= width - n).long() for n in lengths])
    return {"input_ids": prompt(len(lengths), width, seed=seed), "attention_mask": mask}


def assert_batch_holds(model, cache, ids, lengths, n_prompt):
    """As `assert_holds`, each sequence by itself."""
    for b, n in enumerate(lengths):
        own = copy.deepcopy(cache)
        own.batch_select_indices(torch.tensor([b]))
        assert_holds(model, own, ids[b : b + 1], n_prompt - n)


def assert_holds(model, cache, ids, padding=0):
    """The cache holds all of `ids [1, N]` but the last, as an exact forward would have it."""
    n = ids.shape[1] - 1
    assert cache.get_seq_length() == n
    assert cache.lengths == [n - padding]
    assert cache.last_positions == [n - padding - 1]
    with torch.no_grad():
        plain = model(ids[:, padding:], use_cache=True).past_key_values
    for layer, dense in zip(cache.layers, plain.layers, strict=True):
        if not hasattr(layer, "store"):
            assert layer.get_seq_length() == n
            assert not layer.record_past
            expected = dense.keys[:, :, : dense.keys.shape[2] - 1][:, :, -10:]
            assert torch.allclose(layer.keys[:, :, -10:], expected, atol=1e-4)
            continue
        store = layer.store
        order = store.rows.tokens[:, :, : n - padding].long().argsort(-1)
        keys = store.k[:, :, : n - padding].gather(
            2, order.unsqueeze(-1).expand(-1, -1, -1, store.k.shape[-1])
        )
        assert torch.allclose(keys, dense.keys[:, :, : n - padding], atol=1e-4)
        assert store.middles[0] <= store.budget.rows_in_lists(n - padding)


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
            ours = generated(model, inputs, past_key_values=cache, max_new_tokens=NEW)
        assert torch.equal(ours, expected)
        drafted += cache.pace.tally.drafted
        accepted += cache.pace.tally.accepted
    assert accepted
    if family != "smollm3":  # its random model says the same everywhere
        assert accepted < drafted, "some drafts are cut off again"
    assert_holds(model, cache, ours)
    assert "generate" not in vars(model)


METHODS = {
    "quest": Budget(max_tokens=8, n_sink=4, window=8, flush_every=4),
    "streaming": Budget(max_tokens=0, n_sink=4, window=8, flush_every=1),
    "kmeans": Budget(max_tokens=8, n_sink=4, window=8, flush_every=4),
    "saap": Budget(max_tokens=8, n_sink=4, window=8),
}


@pytest.mark.parametrize("method", METHODS)
def test_any_method_drafts(llama, method):
    model, index = llama
    inputs = inputs_of(prompt(1, 560 if method == "saap" else 60, seed=11))
    expected = generated(model, inputs, max_new_tokens=NEW)
    with attached(model, index if method == "kmeans" else None, METHODS[method], method) as own:
        cache = own.cache()
        ours = generated(model, inputs, past_key_values=cache, max_new_tokens=NEW)
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
        ours = generated(model, inputs_of(prompt(1, 60)), past_key_values=cache)
    assert_holds(model, cache, ours)
    assert cache.layers[0].store.middles[0] > 60 - 4 - 8


@pytest.mark.parametrize("length", [1, 3, 12])
def test_short_prompts(llama, length):
    model, index = llama
    inputs = inputs_of(prompt(1, length))
    with attached(model, index) as saap_model:
        cache = saap_model.cache()
        ours = generated(model, inputs, past_key_values=cache, max_new_tokens=20)
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
            ours = generated(model, inputs, past_key_values=cache, max_new_tokens=9)
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
            ours = generated(model, inputs, past_key_values=cache, max_new_tokens=12)
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
            ours = generated(model, inputs, past_key_values=cache, **options)
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
            ours = generated(model, inputs, past_key_values=cache, **options)
        assert torch.equal(ours, expected)
        assert bool((ours[0, n:] == 0).all()) == (eos is not None)
        assert_batch_holds(model, cache, ours, LENGTHS, 60)


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
            found = model.generate(
                **inputs, past_key_values=cache, num_return_sequences=n_each, **options
            )
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


def test_adapting_gives_the_same_tokens(llama):
    model, index = llama
    inputs = inputs_of(prompt(1, 60, seed=2))
    with attached(model, index, verify=8) as saap_model:
        cache = saap_model.cache()
        ours = generated(model, inputs, past_key_values=cache, max_new_tokens=60)
        assert torch.equal(ours, generated(model, inputs, max_new_tokens=60))
    assert cache.pace.tally.exact_steps >= 2


class Marks(LogitsProcessor):
    """Keeps state: forbids what it was asked about last, and counts its calls."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids[0].tolist())
        scores = scores.clone()
        scores[:, (7 * len(self.seen)) % scores.shape[1] :: 5] = -torch.inf
        return scores


def test_logits_processors(llama):
    model, index = llama
    inputs = inputs_of(prompt(1, 60, seed=4))
    options = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "max_new_tokens": NEW}
    asked = []
    for given in ({}, {"past_key_values": ...}):
        marks = Marks()
        with attached(model, index) as saap_model:
            if given:
                given = {"past_key_values": saap_model.cache()}
            own = generated(
                model, inputs, logits_processor=LogitsProcessorList([marks]), **options, **given
            )
        asked.append((own.tolist(), marks.seen))
    assert asked[0] == asked[1]


def test_scores_and_streaming(llama):
    model, index = llama
    inputs = inputs_of(prompt(1, 60, seed=5))
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    dense = generated(model, inputs, max_new_tokens=NEW, **wanted)
    kept = Kept()
    with attached(model, index) as saap_model:
        cache = saap_model.cache()
        ours = generated(
            model, inputs, past_key_values=cache, streamer=kept, max_new_tokens=NEW, **wanted
        )
    assert torch.equal(ours.sequences, dense.sequences)
    for name in ("scores", "logits"):
        pairs = zip(ours[name], dense[name], strict=True)
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in pairs)
    assert ours.past_key_values is cache
    new = ours.sequences[0, 60:].tolist()
    assert kept.tokens == [inputs["input_ids"][0].tolist(), *[[t] for t in new], "end"]


class Until(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **_):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("stopped_by", ["criteria", "eos", "interrupt"])
def test_stopped_at_every_place_of_a_draft(llama, stopped_by):
    model, index = llama
    inputs = inputs_of(prompt(1, 60, seed=0))
    dense = generated(model, inputs, max_new_tokens=30)
    with attached(model, index) as saap_model:
        for n in range(1, 14):
            cache, options = saap_model.cache(), {}
            if stopped_by == "criteria":
                options["stopping_criteria"] = [Until(60 + n)]
            elif stopped_by == "eos":
                options["eos_token_id"] = int(dense[0, 59 + n])
                first = dense[0, 60:].tolist().index(options["eos_token_id"])
            else:
                options["streamer"] = Kept(n)
            try:
                found = generated(
                    model, inputs, past_key_values=cache, max_new_tokens=30, **options
                )
            except KeyboardInterrupt:
                found = dense[:, : 60 + n]
            length = 60 + (first + 1 if stopped_by == "eos" else n)
            assert torch.equal(found, dense[:, :length])
            assert_holds(model, cache, found)
            assert not cache.exact
        more = generated(model, inputs_of(found), past_key_values=cache, max_new_tokens=6)
        assert torch.equal(more, generated(model, inputs_of(found), max_new_tokens=6))


def test_stop_strings(reference_model, reference_tokenizer):
    text = "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n" * 3
    inputs = inputs_of(reference_tokenizer(text, return_tensors="pt").input_ids)
    options = {"stop_strings": ["return"], "tokenizer": reference_tokenizer, "max_new_tokens": 40}
    options["eos_token_id"] = None
    dense = generated(reference_model, inputs, **options)
    with attached(reference_model, method="streaming", budget=METHODS["streaming"]) as saap_model:
        cache = saap_model.cache()
        ours = generated(reference_model, inputs, past_key_values=cache, **options)
        assert torch.equal(ours, dense)
        assert_holds(reference_model, cache, ours)
        options.pop("tokenizer")
        with pytest.raises(ValueError, match="tokenizer must be the model's where stop_strings"):
            generated(reference_model, inputs, past_key_values=saap_model.cache(), **options)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("broken", range(2, 14, 3))
def test_a_forward_that_breaks_off_leaves_what_was_accepted(family, broken, monkeypatch):
    model = make(family)
    inputs, kept = inputs_of(prompt(1, 60, seed=0)), Kept()
    dense = generated(model, inputs, max_new_tokens=30)
    calls = []
    own = model.model.layers[1].mlp.forward

    def breaks(x):
        calls.append(x)
        if len(calls) == broken:
            raise MemoryError
        return own(x)

    with attached(model, random_index(model)) as saap_model:
        cache = saap_model.cache()
        with monkeypatch.context() as patched:
            patched.setattr(model.model.layers[1].mlp, "forward", breaks)
            with pytest.raises(MemoryError):
                generated(model, inputs, past_key_values=cache, streamer=kept)
        ids = dense[:, : 60 + len(kept.tokens) - 1]
        assert_holds(model, cache, ids)
        more = generated(model, inputs_of(ids), past_key_values=cache, max_new_tokens=6)
        assert torch.equal(more, dense[:, : ids.shape[1] + 6])


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
                past_key_values=saap_model.cache(), **options,
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


BAD = {
    "beams": ({"num_beams": 2}, r"must be greedy_search or sample .*; got beam_search"),
    "lookup": ({"prompt_lookup_num_tokens": 3}, "got assisted_generation"),
    "loop": ({"custom_generate": print}, "custom_generate must be None where verify is set"),
    "states": (
        {"output_hidden_states": True, "return_dict_in_generate": True},
        "output_hidden_states must be False where verify is set; got True",
    ),
}


@pytest.mark.parametrize("wrong", BAD)
def test_bad_options(llama, wrong):
    model, index = llama
    options, message = BAD[wrong]
    with attached(model, index) as saap_model:
        cache = saap_model.cache()
        with pytest.raises(ValueError, match=message):
            generated(model, {"input_ids": prompt(1, 9), **options}, past_key_values=cache)
        assert cache.lengths == []


@pytest.mark.parametrize("drafts", [0, -1, True, 2.0, "8"])
def test_bad_number_of_drafts(llama, drafts):
    model, index = llama
    with (
        pytest.raises(
            ValueError, match=f"verify must be an integer of at least 1; got {drafts!r}"
        ),
        attached(model, index, verify=drafts),
    ):
        pass


def test_cache_of_another_block_and_a_copy(llama):
    model, index = llama
    inputs = inputs_of(prompt(1, 30))
    with attached(model, index, verify=None) as saap_model:
        other = saap_model.cache()
    with attached(model, index) as saap_model:
        with pytest.raises(ValueError, match="this SaapCache must belong to this model and block"):
            generated(model, inputs, past_key_values=other)
        copied = copy.deepcopy(model)
        assert torch.equal(generated(copied, inputs), generated(model, inputs))
    with attached(copied, index, verify=None) as saap_model:
        cache = saap_model.cache()
        generated(copied, inputs, past_key_values=cache)
        assert cache.pace is None


@pytest.mark.parametrize("family", ["dynamic", "longrope"])
def test_rope_that_depends_on_the_length_is_refused(family):
    model = make(family)
    with (
        pytest.raises(ValueError, match=rf"must not be dynamic or longrope; got '{family}'"),
        attached(model, random_index(model)),
    ):
        pass
