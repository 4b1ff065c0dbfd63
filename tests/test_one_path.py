"""What evaluation measures is what users run, and both are the model's own at full budget.

Users: `saap.attached`, the prompt as one forward, then tokens one by one. Evaluation: the decoder
of `saap.eval.decoding` over a context that was read densely.
"""

import dataclasses

import jaxtyping
import pytest
import torch

import saap
from saap import hf
from saap.budget import Budget
from saap.eval.decoding import decoder
from saap.eval.tasks.attention import LayerProblem
from saap.index.coordinates import balanced
from saap.index.moments import Moments
from saap.methods import METHODS, find_method
from saap.methods.saap import SaapSelector

from .conftest import random_model
from .test_generate import GEMMA, assert_same_logits, make, random_index

PROMPT, DECODED = 150, 64
LAYOUT = {"n_sink": 4, "window": 16, "flush_every": 8}
FEW = Budget(max_tokens=24, **LAYOUT)
LEFT_OUT = dataclasses.replace(FEW, estimate_rest=False)
WHOLE = Budget(max_tokens=10**6, **LAYOUT)

# Windows of 24 tokens: shorter than every text here.
FAMILIES = ("gemma2", "gemma3", "mistral-window", "cohere2", "exaone4", "gpt_oss")
SOME = ("saap", "blend", "quest", "kmeans-online", "oracle-tokens")


def built(family):
    if family == "mistral-window":
        model = random_model("mistral", sliding_window=24)
    elif family == "gemma3":
        kinds = ["sliding_attention", "full_attention"]
        model = random_model("gemma3_text", **GEMMA, layer_types=kinds)
    else:
        model = make(family)
    model.set_attn_implementation("eager")
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    model = built(request.param)
    return model, with_coordinates(random_index(model))


def with_coordinates(index):
    """What `saap` needs of an index for short prompts; any will do."""
    generator = torch.Generator().manual_seed(7)
    queries, keys = torch.randn(2, 2, 64, 16, generator=generator)
    own = balanced(Moments.of(queries, keys))
    layers = tuple(dataclasses.replace(layer, coordinates=own) for layer in index.layers)
    return dataclasses.replace(index, layers=layers)


@pytest.fixture(scope="module")
def llama(tiny_model, tiny_index):
    return tiny_model, tiny_index


def text(n=PROMPT + DECODED, seed=4):
    return torch.randint(3, 96, (n,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def as_users_do(model, index, name, budget, tokens, n_prompt=PROMPT):
    """Logits after each token from the last of the prompt on."""
    with saap.attached(model, index, budget, method=name) as saap_model:
        cache = saap_model.cache()
        found = [model(tokens[None, :n_prompt], **hf.over(cache)).logits[0, -1:]]
        for token in tokens[n_prompt:]:
            found.append(model(token[None, None], **hf.over(cache)).logits[0])
        shares = [layer.store.visited_share for layer in cache.saap_layers]
    return torch.cat(found), shares


@torch.no_grad()
def greedily(model, index, name, budget, tokens, n):
    """The n tokens that follow, and the logits after each but the last."""
    with saap.attached(model, index, budget, method=name) as saap_model:
        cache, pending, found, logits = saap_model.cache(), tokens[None], [], []
        for _ in range(n):
            logits.append(model(pending, **hf.over(cache)).logits[0, -1])
            pending = logits[-1].argmax()[None, None]
            found.append(int(pending))
    return found, torch.stack(logits[1:])


@torch.no_grad()
def check_one_path(model, index, name):
    """Users' decoding is evaluation's, and not the model's own where something is left out."""
    prompt = text(PROMPT)
    generated, logits = greedily(model, index, name, LEFT_OUT, prompt, DECODED)
    read = hf.read_context(model, prompt, chunk=64)
    with decoder(model, read, find_method(name)(index), LEFT_OUT, DECODED) as own:
        found = own.logits(generated[:-1])
        searched = len(own.cache.saap_layers)
        assert own.visited.steps == (DECODED - 1) * searched
        selectivity = own.visited.selectivity
    assert found.argmax(-1).tolist() == generated[1:]
    assert_same_logits(found, logits)
    exact = own_logits(model, torch.cat([prompt, torch.tensor(generated[:-1])]))[PROMPT:]
    if searched and name != "dense":
        assert selectivity < 0.5
        assert (found - exact).abs().max() > 1e-4
    else:
        assert selectivity == 1.0
        assert_same_logits(found, exact)


@torch.no_grad()
def own_logits(model, tokens=None):
    return model((text() if tokens is None else tokens)[None]).logits[0]


@pytest.fixture(autouse=True)
def unchecked(annotations):
    """Annotations are checked in the other files; here they would take most of the time."""
    jaxtyping.config.update("jaxtyping_disable", True)


@pytest.mark.parametrize("name", METHODS)
def test_evaluation_decodes_as_users_do(llama, name):
    check_one_path(*llama, name)


@torch.no_grad()
def test_evaluation_estimates_as_users_do(llama):
    """Keys that differ in their last bit may put a part of the estimate, which has 16 bits, on the
    other side of an edge: a 256th of what the estimate does to a logit is allowed for."""
    model, index = llama
    prompt = text(PROMPT)
    generated, logits = greedily(model, index, "saap", FEW, prompt, DECODED)
    read = hf.read_context(model, prompt, chunk=64)
    found = []
    for budget in (FEW, LEFT_OUT):
        with decoder(model, read, find_method("saap")(index), budget, DECODED) as own:
            found.append(own.logits(generated[:-1]))
    moved = (found[0] - found[1]).abs()
    assert moved.max() > 1e-3
    rounding = 64 * torch.finfo(torch.float32).eps * max(1.0, float(logits.abs().max()))
    assert ((found[0] - logits).abs() <= rounding + moved.amax(-1, keepdim=True) / 256).all()


@pytest.mark.parametrize("name", ["dense", *SOME])
def test_evaluation_decodes_as_users_do_in_families(case, name):
    check_one_path(*case, name)


@pytest.mark.parametrize("share", ["group", "head"])
@pytest.mark.parametrize("name", METHODS)
def test_full_budget_is_the_models_own_attention(llama, name, share):
    model, index = llama
    budget = Budget(max_tokens=10**6, share=share, **LAYOUT)
    logits, shares = as_users_do(model, index, name, budget, text()[: PROMPT + 20])
    assert shares == [1.0, 1.0]
    assert_same_logits(logits, own_logits(model)[PROMPT - 1 : PROMPT + 20])


@pytest.mark.parametrize("name", SOME)
def test_full_budget_is_the_models_own_attention_in_families(case, name):
    model, index = case
    logits, shares = as_users_do(model, index, name, WHOLE, text()[: PROMPT + 12])
    assert set(shares) <= {1.0}
    assert_same_logits(logits, own_logits(model)[PROMPT - 1 : PROMPT + 12])


def padded(lengths):
    """Prompts of these lengths with padding on the left, and the mask of all tokens decoded."""
    n, steps = max(lengths), 12
    each = [text(own + steps, seed=own) for own in lengths]
    rows = [
        torch.cat([torch.zeros(n - own).long(), t]) for own, t in zip(lengths, each, strict=True)
    ]
    mask = torch.arange(n + steps) >= n - torch.tensor(lengths)[:, None]
    return each, torch.stack(rows), mask.long(), n


@torch.no_grad()
def in_a_batch(model, index, name, budget, lengths):
    _, rows, mask, n = padded(lengths)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found, start = [], 0
    with saap.attached(model, index, budget, method=name) as saap_model:
        cache = saap_model.cache()
        for stop in range(n, rows.shape[1] + 1):
            step = model(
                rows[:, start:stop], attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop], **hf.over(cache),
            )  # fmt: skip
            found.append(step.logits[:, -1])
            start = stop
    return torch.stack(found, 1)


def check_batch(model, index, name):
    # The second has its first rows in the middle some steps after the first has; the last, none.
    lengths = [PROMPT, 22, 9]
    together = in_a_batch(model, index, name, FEW, lengths)
    for b, own in enumerate(lengths):
        alone, _ = as_users_do(model, index, name, FEW, padded(lengths)[0][b], own)
        assert_same_logits(together[b], alone)


# `random` draws for the sequences of a batch in turn: other buckets than alone, by design.
@pytest.mark.parametrize("name", [name for name in METHODS if name != "random"])
def test_a_batch_with_left_padding_is_each_alone(llama, name):
    check_batch(*llama, name)


@pytest.mark.parametrize("name", ["saap", "blend", "kmeans-online"])
def test_a_batch_with_left_padding_is_each_alone_in_families(case, name):
    check_batch(*case, name)


def test_saap_without_an_index_learns_the_same_on_both_paths(tiny_model, monkeypatch):
    monkeypatch.setattr(SaapSelector, "least_rows", 32)
    check_one_path(tiny_model, None, "saap")
    check_batch(tiny_model, None, "saap")


@pytest.mark.parametrize("name", SOME)
def test_beams_see_what_their_own_tokens_left(llama, name):
    """After sequences were reordered, each decodes as one that never had company."""
    model, index = llama
    a, b = text(PROMPT + 6, seed=1), text(PROMPT + 6, seed=2)
    with torch.no_grad(), saap.attached(model, index, FEW, method=name) as saap_model:
        cache = saap_model.cache()
        both = torch.stack([a, b])
        model(both[:, :PROMPT], **hf.over(cache))
        for t in range(PROMPT, PROMPT + 6):
            if t == PROMPT + 3:
                cache.reorder_cache(torch.tensor([1, 1]))
                both = both[[1, 1]]
            logits = model(both[:, t : t + 1], **hf.over(cache)).logits
    alone, _ = as_users_do(model, index, name, FEW, b)
    for own in logits[:, 0]:
        assert_same_logits(own, alone[-1])


@pytest.mark.parametrize("name", ["saap", "blend", "quest", "kmeans-online", "pq"])
@pytest.mark.parametrize("kept", [PROMPT, PROMPT - 30, 30])
def test_after_a_crop_a_cache_is_as_if_it_had_never_been_longer(llama, name, kept):
    model, index = llama
    tokens = text(PROMPT + 6)
    with torch.no_grad(), saap.attached(model, index, FEW, method=name) as saap_model:
        cache = saap_model.cache()
        model(tokens[None, :PROMPT], **hf.over(cache))
        for token in tokens[PROMPT:]:
            model(token[None, None], **hf.over(cache))
        cache.crop(kept - cache.get_seq_length())
        again = text(kept + 6)
        again[:kept] = tokens[:kept]
        found = [model(token[None, None], **hf.over(cache)).logits[0, 0] for token in again[kept:]]
    alone, _ = as_users_do(model, index, name, FEW, again, kept)
    assert_same_logits(torch.stack(found), alone[1:])


def test_one_context_gives_the_same_under_every_budget_and_in_any_order(case):
    """`restart` leaves nothing behind: neither of the layout nor of sliding windows."""
    model, index = case
    read = hf.read_context(model, text(PROMPT))
    tokens = text()[PROMPT : PROMPT + 20]
    for name in ("saap", "kmeans-online"):
        with decoder(model, read, find_method(name)(index), FEW, 20) as own:
            first = own.logits(tokens)
            own.restart(WHOLE)
            assert_same_logits(own.logits(tokens), own_logits(model)[PROMPT : PROMPT + 20])
            own.restart(FEW)
            assert torch.equal(own.logits(tokens), first), name


def test_the_attention_task_measures_the_models_own_attention(case):
    """`dense` has no error, and `exact` is softmax over all that the query may see."""
    model, index = case
    read = hf.read_context(model, text(PROMPT), n_queries=8)
    full = [layer for layer in hf.model_layers(model) if layer.is_full]
    assert sorted(read.queries) == [layer.info.number for layer in full]
    for layer in full:
        problem = LayerProblem(read, layer.info, FEW)
        measured = problem.measure(problem.store_for(find_method("dense")(index), FEW), FEW)
        assert measured["output_error"] < 1e-5
        assert measured["selectivity"] == pytest.approx(1.0)
        assert measured["middle_caught"] == pytest.approx(measured["middle_mass"], rel=1e-4)
        assert sum(measured["needle_lost"]) == 0
        k, v, _ = read.keys(layer.info.number)
        for number, q in enumerate(problem.q_rope):
            n = problem.n_context + 1 + number
            scores = (q.unflatten(0, (2, -1)) @ k[0, :, :n].mT) * layer.info.sm_scale
            if layer.info.softcap is not None:
                scores = layer.info.softcap * torch.tanh(scores / layer.info.softcap)
            true = (scores.softmax(-1) @ v[0, :, :n]).flatten(0, 1)
            assert (problem.exact[0][number] - true).abs().max() < 1e-5
