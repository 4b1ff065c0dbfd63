"""Lossless decoding that is processed, streamed, stopped, or broken off within a draft."""

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria

from saap.hf import over
from saap.hf.cache_argument import NAME

from .lossless_cases import METHODS, NEW, Kept, assert_holds, attached, inputs_of, small_llama
from .test_generate import generated, make, prompt, random_index

pytestmark = pytest.mark.many_steps


@pytest.fixture(scope="module")
def llama():
    return small_llama()


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
    for sparse in (False, True):
        marks = Marks()
        with attached(model, index) as saap_model:
            given = over(saap_model.cache()) if sparse else {}
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
        ours = generated(model, inputs, **over(cache), streamer=kept, max_new_tokens=NEW, **wanted)
    assert torch.equal(ours.sequences, dense.sequences)
    for name in ("scores", "logits"):
        pairs = zip(ours[name], dense[name], strict=True)
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in pairs)
    assert ours[NAME] is cache
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
                found = generated(model, inputs, **over(cache), max_new_tokens=30, **options)
            except KeyboardInterrupt:
                found = dense[:, : 60 + n]
            length = 60 + (first + 1 if stopped_by == "eos" else n)
            assert torch.equal(found, dense[:, :length])
            assert_holds(model, cache, found)
            assert not cache.exact
        more = generated(model, inputs_of(found), **over(cache), max_new_tokens=6)
        assert torch.equal(more, generated(model, inputs_of(found), max_new_tokens=6))


@pytest.mark.parametrize("of_model", [False, True])
def test_stop_strings(reference_model, reference_tokenizer, of_model, monkeypatch):
    """Given to `generate()`, or those of the model's own settings."""
    text = "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n" * 3
    inputs = inputs_of(reference_tokenizer(text, return_tensors="pt").input_ids)
    options = {"stop_strings": ["return"], "tokenizer": reference_tokenizer, "max_new_tokens": 40}
    options["eos_token_id"] = None
    if of_model:
        own = reference_model.generation_config
        monkeypatch.setattr(own, "stop_strings", options.pop("stop_strings"))
    dense = generated(reference_model, inputs, **options)
    with attached(reference_model, method="streaming", budget=METHODS["streaming"]) as saap_model:
        cache = saap_model.cache()
        ours = generated(reference_model, inputs, **over(cache), **options)
        assert torch.equal(ours, dense)
        assert_holds(reference_model, cache, ours)
        assert not of_model or own.stop_strings == ["return"]
        options.pop("tokenizer")
        with pytest.raises(ValueError, match="tokenizer must be the model's where stop_strings"):
            generated(reference_model, inputs, **over(saap_model.cache()), **options)


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
                generated(model, inputs, **over(cache), streamer=kept)
        ids = dense[:, : 60 + len(kept.tokens) - 1]
        assert_holds(model, cache, ids)
        more = generated(model, inputs_of(ids), **over(cache), max_new_tokens=6)
        assert torch.equal(more, dense[:, : ids.shape[1] + 6])
