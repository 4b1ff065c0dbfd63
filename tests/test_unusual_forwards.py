"""Forwards that break off, masks of other forms, and numbers that are none: nothing goes wrong
silently, and what was there before stays."""

import pytest
import torch

import saap
from saap import context_folder, hf
from saap.budget import Budget

from .conftest import random_model
from .test_families import FULL, OPTIONS
from .test_families import make as make_family
from .test_generate import assert_same_logits, prompt

pytestmark = pytest.mark.many_steps

FEW = Budget(max_tokens=48, n_sink=4, window=8)


def make(family, **options):
    """Also of the families that `test_generate` has."""
    return make_family(family) if family in OPTIONS else random_model(family, **options)


def break_off(model, cache, tokens, module):
    """A forward that ends before `module`."""
    hook = module.register_forward_pre_hook(lambda *_: 1 / 0)
    try:
        with pytest.raises(ZeroDivisionError):
            model(tokens, **hf.over(cache))
    finally:
        hook.remove()


@torch.no_grad()
@pytest.mark.parametrize("directory", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "falcon_h1", "qwen3_5_text"])
def test_what_broke_off_is_not_saved_over_what_was_whole(tmp_path, family, directory):
    model, tokens, path = make(family), prompt(1, 60), tmp_path / "context"
    own = model(tokens).logits[:, 40:]
    with saap.attached(model, budget=FULL) as saap_model:
        cache = saap_model.cache(directory=path if directory else None)
        model(tokens[:, :40], **hf.over(cache))
        saap_model.save_context(cache, tokens[0, :40], path)
        break_off(model, cache, tokens[:, 40:41], model.model.layers[1])
        for held in (40, 41):
            with pytest.raises(ValueError, match="a forward was broken off: start a new cache"):
                saap_model.save_context(cache, tokens[0, :held], path)
        cache.close()
        again, held = saap_model.open_context(path)
        assert torch.equal(held, tokens[0, :40])
        assert_same_logits(model(tokens[:, 40:], **hf.over(again)).logits, own)
        again.close()


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "llama4_text", "falcon_h1"])
def test_a_context_that_was_read_is_rewound_after_a_forward_that_broke_off(family):
    model, tokens = make(family), prompt(1, 60)[0]
    own = model(tokens[None]).logits[0, 40:]
    read = hf.read_context(model, tokens[:40])
    with saap.attached(model, budget=FULL) as saap_model:
        cache = hf.cache_from(saap_model, read, 60)
        break_off(model, cache, tokens[None, 40:41], model.model.layers[1])
        hf.rewind(cache, read)
        assert_same_logits(model(tokens[None, 40:], **hf.over(cache)).logits[0], own)


@torch.no_grad()
@pytest.mark.parametrize("directory", [False, True])
def test_a_convolution_that_records_its_past_is_saved(tmp_path, directory):
    model, tokens, path = make("lfm2"), prompt(1, 60), tmp_path / "context"
    own = model(tokens).logits[:, 40:]
    with saap.attached(model, budget=FULL) as saap_model:
        cache = saap_model.cache(directory=path if directory else None)
        cache.activate_past_recording()
        model(tokens[:, :40], **hf.over(cache))
        saap_model.save_context(cache, tokens[0, :40], path)
        cache.close()
        again, _ = saap_model.open_context(path)
        assert_same_logits(model(tokens[:, 40:], **hf.over(again)).logits, own)
        again.close()


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "llama4_text", "falcon_h1"])
def test_padding_behind_a_token_is_refused_and_loses_nothing(family):
    """Also where no layer is searched, or one that is not comes first."""
    options = {"sliding_window": 24} if family == "mistral" else {}
    model, tokens = make(family, **options), prompt(2, 45)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 30:] = 0
    with saap.attached(model, budget=FULL) as saap_model:
        cache = saap_model.cache()
        with pytest.raises(ValueError, match="padding must be on the left"):
            model(tokens[:, :40], attention_mask=mask, **hf.over(cache))
        model(tokens[:, :40], **hf.over(cache))
        gap = torch.ones(2, 45, dtype=torch.long)
        gap[1, 40:42] = 0
        with pytest.raises(ValueError, match="padding must be on the left"):
            model(tokens[:, 40:], attention_mask=gap, **hf.over(cache))
        found = model(tokens[:, 40:], **hf.over(cache)).logits
    assert_same_logits(found, model(tokens).logits[:, 40:])


def shown(kind, n, window=24):
    """What layers of the kind show, `[n, n]`."""
    i = torch.arange(n)
    near = i[:, None] // window == i // window
    if kind == "sliding_attention":
        near = i[:, None] - i < window
    return torch.ones(n, n).tril().bool() & near


@torch.no_grad()
@pytest.mark.parametrize("change", ["none", "hides", "wider", "later"])
@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama4_text", "chunked_attention"), ("gemma4_text", "sliding_attention")],
)
def test_a_mask_of_each_kind_of_layer_is_followed(family, kind, change):
    model, tokens, n = make(family), prompt(1, 60), 60
    model.set_attn_implementation("eager")
    whole = torch.ones(n, n).tril().bool()
    own = shown(kind, n)
    if change == "hides":
        own[5:10, 2] = False
    elif change == "wider":
        own = whole.clone()
    elif change == "later":
        own[5, 8] = True
    masks = {
        name: torch.zeros(1, 1, n, n).masked_fill(~m, torch.finfo(torch.float32).min)
        for name, m in (("full_attention", whole), (kind, own))
    }
    expected = model(tokens, attention_mask=masks).logits
    assert (torch.allclose(expected, model(tokens).logits, atol=1e-4)) == (change == "none")
    with saap.attached(model, budget=FULL) as saap_model:
        found = model(tokens, attention_mask=masks, **hf.over(saap_model.cache())).logits
    assert_same_logits(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("directory", [False, True])
def test_an_opened_context_goes_on_with_sparse_prefill(tmp_path, directory):
    model, tokens, path = make("llama"), prompt(1, 900), tmp_path / "context"
    prefill = saap.PrefillBudget(visited=0.1, dense_below=256)
    with saap.attached(model, budget=FEW, prefill=prefill) as saap_model:
        cache = saap_model.cache(directory=path if directory else None)
        model(tokens[:, :600], **hf.over(cache))
        saap_model.save_context(cache, tokens[0, :600], path)
        own = model(tokens[:, 600:], **hf.over(cache)).logits
        cache.close()
        again, _ = saap_model.open_context(path)
        assert torch.equal(model(tokens[:, 600:], **hf.over(again)).logits, own)
        assert again.read_share < 0.5
        again.close()


@torch.no_grad()
@pytest.mark.parametrize("directory", [False, True])
@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_unified_text", "jetmoe"])
def test_layers_whose_keys_are_others_or_repeated_are_saved_and_verified(
    tmp_path, family, directory
):
    model, tokens, path = make(family), prompt(1, 60), tmp_path / "context"
    own = model(tokens).logits[:, 40:]
    with saap.attached(model, budget=FULL) as saap_model:
        cache = saap_model.cache(directory=path if directory else None)
        model(tokens[:, :40], **hf.over(cache))
        saap_model.save_context(cache, tokens[0, :40], path)
        cache.close()
        if directory:
            context_folder.verify(path)
        again, _ = saap_model.open_context(path)
        assert_same_logits(model(tokens[:, 40:], **hf.over(again)).logits, own)
        again.close()


@torch.no_grad()
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_numbers_that_are_none_harm_their_own_sequence_alone(value):
    model, tokens = make("llama"), prompt(2, 641)
    tokens[tokens == 95] = 94
    alone = tokens[:1].clone()
    tokens[1, 100] = 95
    model.model.embed_tokens.weight[95] = value
    found = []
    with saap.attached(model, budget=FEW) as saap_model:
        for given in (alone, tokens):
            cache = saap_model.cache()
            model(given[:, :640], **hf.over(cache))
            found.append(model(given[:, 640:], **hf.over(cache)).logits)
    assert_same_logits(found[1][:1], found[0])
    assert found[1][1].isnan().all()
