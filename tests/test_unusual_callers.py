"""Callers that do what few do: other modes of torch, models of other kinds, saving again, settings
between. They get what dense attention gives, or one clear line."""

import contextlib
import copy

import pytest
import torch
import transformers

import saap
from saap import hf
from saap.budget import Budget
from saap.hf import over

from .conftest import SMALL as SIZES
from .conftest import random_model
from .test_families import FULL
from .test_families import make as make_family
from .test_generate import assert_same_logits, make, prompt, random_index

pytestmark = pytest.mark.many_steps

FEW = Budget(max_tokens=24, n_sink=4, window=8)


def read(model, cache, tokens, *cuts):
    """Logits of the last of several forwards, up to each cut."""
    first = cache.get_seq_length()
    for last in cuts:
        logits = model(tokens[:, first:last], **over(cache)).logits
        first = last
    return logits


@torch.no_grad()
@pytest.mark.parametrize("method", ["saap", "dense", "kmeans-online", "blend"])
def test_a_context_is_saved_again_after_it_went_on(tmp_path, method):
    model, tokens, path = random_model("llama", max_position_embeddings=2048), prompt(1, 700), None
    index = random_index(model) if method in ("kmeans-online", "blend") else None
    path = tmp_path / "context"
    with saap.attached(model, index, FEW, method=method) as saap_model:
        cache = saap_model.cache()
        for n in (650, 651, 690):
            read(model, cache, tokens, n)
            saap_model.save_context(cache, tokens[0, :n], path)
            again, held = saap_model.open_context(path)
            assert torch.equal(held, tokens[0, :n])
            own = read(model, copy.deepcopy(cache), tokens, n + 1)
            assert_same_logits(read(model, again, tokens, n + 1), own)


@torch.no_grad()
@pytest.mark.parametrize("directory", [False, True])
def test_a_cache_is_saved_with_the_budget_that_it_was_made_with(tmp_path, directory):
    model, tokens, path = random_model("llama"), prompt(1, 90), tmp_path / "context"
    other = Budget(max_tokens=24, n_sink=12, window=8, dense_layers=(0,))
    with saap.attached(model, budget=FEW) as saap_model:
        cache = saap_model.cache(directory=path if directory else None)
        own = read(model, cache, tokens, 80, 90)
        saap_model.budget = other
        cache.crop(-5)
        saap_model.save_context(cache, tokens[0, :85], path)
        cache.close()
        with pytest.raises(ValueError, match="another budget"):
            saap_model.open_context(path)
        saap_model.budget = FEW
        again, _ = saap_model.open_context(path)
        assert_same_logits(read(model, again, tokens, 90), own[:, -5:])
        again.close()


@pytest.mark.bad_input
def test_a_budget_that_is_set_is_checked_as_that_of_attached():
    model = random_model("llama")
    with saap.attached(model, budget=FEW) as saap_model:
        for wrong, told in (
            (
                Budget(max_tokens=9, dense_layers=(7,)),
                r"dense_layers must be in 0\.\.1; got \(7,\)",
            ),
            (Budget(nprobe=3), "got nprobe=3"),
            (
                Budget(max_tokens=9, min_weight=0.1, layer_importance=(1.0,)),
                "layer_importance must have 2 numbers, one for each layer; got 1",
            ),
        ):
            with pytest.raises(ValueError, match=told):
                saap_model.budget = wrong
            assert saap_model.budget == FEW


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("family", ["llama", "gemma3", "falcon_h1"])
def test_a_copied_or_opened_cache_goes_on_in_any_mode(tmp_path, family, mode):
    model = make(family) if family != "falcon_h1" else random_model(family)
    tokens, path = prompt(1, 60), tmp_path / "context"
    with torch.no_grad():
        own = model(tokens).logits[:, 40:]
    with saap.attached(model, budget=FULL) as saap_model:
        with mode():
            cache = saap_model.cache()
            read(model, cache, tokens, 40)
            saap_model.save_context(cache, tokens[0, :40], path)
            twin, opened = copy.deepcopy(cache), saap_model.open_context(path)[0]
            others = copy.deepcopy(cache), saap_model.open_context(path)[0]
            for each in (twin, opened, cache):
                assert_same_logits(read(model, each, tokens, 60), own)
        with torch.no_grad():  # also where it was not made
            for each in others:
                assert_same_logits(read(model, each, tokens, 50, 60), own[:, 10:])


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek_v2"])
def test_under_autocast_tokens_are_near_those_without(family):
    model = make_family(family) if family == "deepseek_v2" else make(family)
    tokens = prompt(1, 60)
    exact = model(tokens).logits[:, 40:]
    with torch.autocast("cpu", torch.bfloat16):
        theirs = model(tokens).logits[:, 40:].float()
        with saap.attached(model, budget=FULL) as saap_model:
            cache = saap_model.cache()
            parts = [read(model, cache, tokens, n).float() for n in (40, *range(41, 61))]
    ours = torch.cat(parts[1:], 1)
    assert (ours - exact).abs().max() < 2 * (theirs - exact).abs().max() + 1e-3


def test_models_of_one_configuration_are_attached_and_left_in_any_order():
    config = transformers.AutoConfig.for_model("llama", **SIZES)
    first, second = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    before, tokens = config._attn_implementation, prompt(1, 30)
    opened = [contextlib.ExitStack() for _ in range(2)]
    one = opened[0].enter_context(saap.attached(first, budget=FULL))
    two = opened[1].enter_context(saap.attached(second, budget=FULL))
    with torch.no_grad():
        own = [model(tokens).logits for model in (first, second)]
        assert_same_logits(read(first, one.cache(), tokens, 30), own[0])
        opened[0].close()
        assert_same_logits(read(second, two.cache(), tokens, 30), own[1])
        opened[1].close()
    assert config._attn_implementation == before


@torch.no_grad()
def test_models_without_generate_decode():
    model, tokens = random_model("llama"), prompt(1, 30)
    base = model.model
    own = base(tokens).last_hidden_state
    with saap.attached(base, budget=FULL) as saap_model:
        cache = saap_model.cache()
        base(tokens[:, :29], **over(cache))
        found = base(tokens[:, 29:], **over(cache)).last_hidden_state
        assert (found - own[:, 29:]).abs().max() < 1e-5
    with (
        pytest.raises(ValueError, match="verify needs a model with generate"),
        saap.attached(base, budget=FULL, verify=2),
    ):
        pass


@torch.no_grad()
def test_a_model_that_torch_compiled_is_attached():
    model, tokens = random_model("llama"), prompt(1, 30)
    own = model(tokens).logits
    with saap.attached(torch.compile(model, backend="eager"), budget=FULL) as saap_model:
        assert_same_logits(read(model, saap_model.cache(), tokens, 29, 30), own[:, 29:])


@torch.no_grad()
def test_a_model_whose_weights_are_offloaded_decodes(tmp_path):
    pytest.importorskip("accelerate")
    model, tokens = random_model("llama"), prompt(1, 30)
    own = model(tokens).logits
    model.save_pretrained(tmp_path / "model")
    places = dict.fromkeys(("model.layers.1", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    offloaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map={**places, "model.embed_tokens": "disk", "model.layers.0": "disk"},
        offload_folder=tmp_path / "offloaded",
        dtype=torch.float32,
    ).eval()
    with saap.attached(offloaded, budget=FULL) as saap_model:
        cache = saap_model.cache()
        assert_same_logits(read(offloaded, cache, tokens, 29, 30), own[:, 29:])
        with pytest.raises(ValueError, match="some that are offloaded: load the model whole"):
            saap_model.save_context(cache, tokens[0], tmp_path / "context")


@pytest.mark.bad_input
def test_what_is_no_index_budget_capacity_or_token_is_told():
    model, tokens = random_model("llama"), prompt(1, 30)
    for arguments, told in (
        ({"index": FEW}, "index must be None or a TrainedIndex"),
        ({"budget": 1024}, r"budget must be a saap\.Budget, or None; got 1024"),
    ):
        with pytest.raises(ValueError, match=told), saap.attached(model, **arguments):
            pass
    with saap.attached(model, budget=FEW) as saap_model, torch.no_grad():
        with pytest.raises(ValueError, match="capacity must be a number of tokens, 0 or more"):
            saap_model.cache(-3)
        cache = saap_model.cache()
        read(model, cache, tokens, 30)
        with pytest.raises(ValueError, match="a forward must be of at least one token; got none"):
            model(tokens[:, :0], **over(cache))
        model(tokens[:, :1], **over(cache))


@pytest.mark.parametrize("load", [hf.load_model, hf.load_tokenizer])
def test_a_name_of_commands_is_told_in_python(load):
    with pytest.raises(ValueError, match=r"source must be saap\.eval\.reference\.FOLDER"):
        load("reference")


@torch.no_grad()
@pytest.mark.parametrize("directory", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3n_text"])
def test_a_context_saved_before_anything_was_learned_goes_on_as_one_never_saved(
    tmp_path, family, directory
):
    """Queries of its tokens are learned from, too."""
    options = {"max_position_embeddings": 2048}
    model = random_model(family, **options) if family == "llama" else make_family(family)
    tokens, path = prompt(1, 720), tmp_path / "context"
    with saap.attached(model, budget=FEW) as saap_model:
        kept = saap_model.cache()
        cache = saap_model.cache(directory=path if directory else None)
        for n in (300, 301, 420):
            for each in (kept, cache):
                read(model, each, tokens, n)
            saap_model.save_context(cache, tokens[0, :n], path)
            cache.close()
            cache, _ = saap_model.open_context(path)
        for n in (650, 651, 652, 700, 701):
            found, own = (read(model, each, tokens, n) for each in (cache, kept))
            assert_same_logits(found, own)
        assert kept.visited_share == cache.visited_share < 0.2
        cache.close()


@torch.no_grad()
def test_saving_changes_nothing_of_what_comes():
    """What was learned depended on how single tokens were added up: on when somebody looked."""
    model, tokens = random_model("llama", max_position_embeddings=2048), prompt(1, 1100)
    with saap.attached(model, budget=FEW) as saap_model:
        kept, saved = (saap_model.cache() for _ in range(2))
        for each in (kept, saved):
            read(model, each, tokens, 600, 601)
        for n in range(602, 1000):
            found, own = (read(model, each, tokens, n) for each in (saved, kept))
            assert torch.equal(found, own), n
            if n % 30 == 0:
                for layer in saved.saap_layers:  # as saving does
                    layer.store.settle()
                    layer.store.selector.state()
                for layer in kept.saap_layers:
                    layer.store.settle()
