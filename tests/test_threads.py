"""Interrupts, threads and copies: an attached model stays whole, whatever happens in the block."""

import copy
import pickle
import random
import threading

import pytest
import torch

import saap
from saap import hf
from saap.hf.cache_argument import NAME
from saap.kv import KVStore

from .test_generate import FULL, SMALL, call, generated, make, prompt, random_index

INPUTS = {"input_ids": prompt(1, 40), "attention_mask": torch.ones(1, 40).long()}


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def case(request):
    model = make(request.param)
    return model, random_index(model), generated(model, INPUTS, max_new_tokens=8)


def raising_at(monkeypatch, error, number):
    """One of the calls on the way through a forward raises `error`: the one of that number."""
    calls = [0]

    def counted(owner, name):
        original = getattr(owner, name)

        def replaced(*arguments, **options):
            calls[0] += 1
            if calls[0] == number:
                raise error
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, replaced)

    for name in ("append", "attend", "select", "reserve", "flush"):
        counted(KVStore, name)
    counted(torch.nn.Linear, "forward")
    counted(torch.nn.Embedding, "forward")
    counted(hf.cache.SaapCache, "begin_forward")
    counted(hf.cache.SaapCache, "update")
    return calls


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_anywhere_leaves_the_model_whole(case, error, monkeypatch):
    model, index, expected = case
    before = model.config._attn_implementation
    places = random.Random(0)
    with saap.attached(model, index, FULL, method="blend") as saap_model:
        with monkeypatch.context() as patched:
            calls = raising_at(patched, error, -1)
            generated(model, INPUTS, max_new_tokens=3, **hf.over(saap_model.cache()))
            total = calls[0]
        for number in [1, 2, total, *places.sample(range(3, total), 8)]:
            cache = saap_model.cache()
            with monkeypatch.context() as patched:
                raising_at(patched, error, number)
                with pytest.raises(error):
                    generated(model, INPUTS, max_new_tokens=3, **hf.over(cache))
            assert not hf.attention._threads.running
            ours = call(model, None, INPUTS["input_ids"], use_cache=False).logits[0, -1]
            assert int(ours.argmax()) == int(expected[0, 40])
        assert torch.equal(generated(model, INPUTS, max_new_tokens=8), expected)
        again = generated(model, INPUTS, max_new_tokens=8, **hf.over(saap_model.cache()))
        assert torch.equal(again, expected)

    def interrupted_block():
        with saap.attached(model, index, FULL, method="blend") as saap_model:
            generated(model, INPUTS, max_new_tokens=3, **hf.over(saap_model.cache()))

    with monkeypatch.context() as patched:
        raising_at(patched, error, places.randrange(3, total))
        with pytest.raises(error):
            interrupted_block()
    assert model.config._attn_implementation == before
    assert not any("forward" in vars(m) or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(generated(model, INPUTS, max_new_tokens=8), expected)


def decoded(model, tokens, cache, n=12):
    """Greedy tokens by plain calls; `cache` None is the model's own."""
    found, pending = [], tokens
    with torch.no_grad():
        for _ in range(n):
            step = model(pending, **hf.over(cache), use_cache=True)
            cache = step[NAME]
            pending = step.logits[:, -1].argmax(-1, keepdim=True)
            found.append(int(pending))
    return found


def together(*jobs):
    results = [None] * len(jobs)
    gate = threading.Barrier(len(jobs))

    def run(number):
        gate.wait()
        results[number] = jobs[number]()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_threads_with_caches_of_their_own_and_without(case):
    model, index, _ = case
    texts = [prompt(1, 60, seed=seed) for seed in range(3)]
    dense = decoded(model, texts[2], None)
    with saap.attached(model, index, SMALL, method="blend") as saap_model:
        alone = [decoded(model, text, saap_model.cache()) for text in texts[:2]]
        for _ in range(3):
            found = together(
                lambda: decoded(model, texts[0], saap_model.cache()),
                lambda: decoded(model, texts[1], saap_model.cache()),
                lambda: decoded(model, texts[2], None),
            )
            assert found == [*alone, dense]


def test_two_threads_may_not_share_a_cache(case):
    model, index, _ = case
    errors = []
    with saap.attached(model, index, SMALL, method="blend") as saap_model:
        cache = saap_model.cache()
        own = cache.saap_layers[0].store

        def second(*arguments, append=own.append):
            try:
                call(model, cache)
            except ValueError as error:
                errors.append(str(error))
            return append(*arguments)

        own.append = second
        call(model, cache, prompt(1, 30))
        del own.append
    assert errors == ["a cache must be used by one forward at a time; got a second one"]


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_of_an_attached_model(case, copied):
    model, index, expected = case
    with saap.attached(model, index, FULL, method="blend") as saap_model:
        twin = copied(model)
        assert torch.equal(generated(twin, INPUTS, max_new_tokens=8), expected)
        with pytest.raises(ValueError, match="SaapCache"):
            call(twin, saap_model.cache())
        with saap.attached(twin, index, FULL, method="blend") as other:
            caches = other.cache(), saap_model.cache()
            for own, cache in zip((twin, model), caches, strict=True):
                found = generated(own, INPUTS, max_new_tokens=8, **hf.over(cache))
                assert torch.equal(found, expected)
    assert torch.equal(generated(twin, INPUTS, max_new_tokens=8), expected)
    with saap.attached(twin, index, FULL, method="blend") as other:
        found = generated(twin, INPUTS, max_new_tokens=8, **hf.over(other.cache()))
        assert torch.equal(found, expected)
