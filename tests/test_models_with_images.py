"""Models that see images, whose decoder is one of the supported families: text, then images."""

import pytest
import torch
from transformers import DynamicCache

import saap
from saap import hf
from saap.budget import Budget
from saap.hf import masks
from saap.kv.chunks import attend_visible
from saap.training import train

from .conftest import random_model
from .models_with_images import CONFIGS, END, IMAGE, START, WINDOWS, with_images
from .test_families import (
    VERSION,
    test_all_rows_have_the_logits_of_dense,
    test_greedy_tokens_are_those_of_dense,
)
from .test_generate import assert_same_logits, generated, prompt

pytestmark = pytest.mark.many_steps

__all__ = ["test_all_rows_have_the_logits_of_dense", "test_greedy_tokens_are_those_of_dense"]

FULL = Budget(max_tokens=10_000, n_sink=4, window=8)
SEEING = ("gemma3", "llava", "qwen2_5_vl", "qwen2_vl", "qwen3_vl")


@pytest.fixture(scope="module", params=[n for n in CONFIGS if not n.startswith("qwen")])
def model(request):
    """Those of Qwen are in `test_families`."""
    return with_images(request.param)


def skip_if_refused(name):
    if "qwen" in name and VERSION < (5, 22):
        pytest.skip("this version of transformers is refused")


def about_an_image(name: str) -> dict:
    """A prompt with one image of four tokens in it."""
    generator = torch.Generator().manual_seed(4)
    before, after = (torch.randint(3, 80, (1, 25), generator=generator) for _ in range(2))
    ids = torch.cat([before, torch.tensor([[START, *[IMAGE] * 4, END]]), after], 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "qwen" in name:
        pixels = torch.randn(16, 3 * 2 * 14 * 14, generator=generator)
        grid = torch.tensor([[1, 4, 4]])
        kinds = (ids == IMAGE).long()
        return inputs | {
            "pixel_values": pixels,
            "image_grid_thw": grid,
            "mm_token_type_ids": kinds,
        }
    inputs["pixel_values"] = torch.randn(1, 3, 28, 28, generator=generator)
    if name == "gemma3":
        inputs["token_type_ids"] = (ids == IMAGE).long()
    return inputs


@pytest.mark.parametrize("name", SEEING)
def test_an_image_is_read_as_dense_attention_reads_it(name):
    skip_if_refused(name)
    model, inputs = with_images(name), about_an_image(name)
    expected = generated(model, inputs, max_new_tokens=12)
    with torch.no_grad():
        own = model(**inputs, **hf.over(DynamicCache(config=model.config))).logits
    with saap.attached(model, budget=FULL) as saap_model:
        cache = saap_model.cache()
        found = generated(model, inputs, max_new_tokens=12, **hf.over(cache))
        assert torch.equal(found, expected)
        assert cache.lengths == [inputs["input_ids"].shape[1] + 11]
        with torch.no_grad():
            logits = model(**inputs, **hf.over(saap_model.cache())).logits
    assert_same_logits(logits, own)


@pytest.mark.parametrize("name", ["gemma3", "llava", "qwen3_vl"])
def test_drafts_after_an_image_are_verified(name):
    skip_if_refused(name)
    model, inputs = with_images(name), about_an_image(name)
    expected = generated(model, inputs, max_new_tokens=12)
    with saap.attached(model, budget=FULL, verify=4) as saap_model:
        cache = saap_model.cache()
        found = generated(model, inputs, max_new_tokens=12, **hf.over(cache))
    assert torch.equal(found, expected)


def test_a_folder_is_loaded_with_its_vision_part(tmp_path):
    """Also one that transformers does not count among causal language models."""
    for name in ("gemma3", "qwen3_vl"):
        model = with_images(name)
        model.save_pretrained(tmp_path / name)
        loaded = hf.load_model(tmp_path / name)
        assert type(loaded) is type(model)
        assert hf.describe(loaded) == hf.describe(model)


@torch.no_grad()
def test_a_context_is_read_and_saved(model, tmp_path):
    tokens, path = prompt(1, 60).clamp(max=80), tmp_path / "context"  # none is an image's
    read = hf.read_context(model, tokens[0, :40], chunk=16)
    own = model(tokens).logits[:, 40:]
    with saap.attached(model, budget=FULL) as saap_model:
        cache = hf.cache_from(saap_model, read)
        saap_model.save_context(cache, tokens[0, :40], path)
        for held in (cache, saap_model.open_context(path)[0]):
            assert_same_logits(model(tokens[:, 40:], **hf.over(held)).logits, own)


def test_an_index_is_trained_for_the_text_part(tiny_tokens):
    model = with_images("mistral3")
    index = train(model, tiny_tokens, nlist=8, steps=2, window=32)
    with torch.no_grad(), saap.attached(model, index, Budget(nprobe=1), method="mlp") as own:
        cache = own.cache()
        model(tiny_tokens[:1], **hf.over(cache))
        model(tiny_tokens[:1, :1], **hf.over(cache))
        assert cache.visited_share < 0.9


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_tokens_of_an_image_see_later_ones(padded):
    """As Gemma 3 has it: alone and beside others, behind text that came before."""
    model, inputs = with_images("gemma3"), about_an_image("gemma3")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if padded:
        ids = torch.cat([ids, ids.roll(7, 1)])
        mask = (torch.arange(ids.shape[1]) >= torch.tensor([0, 9])[:, None]).long()
    text = prompt(len(ids), 30).clamp(max=80)
    mask = torch.cat([torch.ones_like(text), mask], 1)
    if padded:
        mask[1] = torch.arange(mask.shape[1]) >= 12
    inputs |= {
        "input_ids": ids, "attention_mask": mask, "token_type_ids": (ids == IMAGE).long(),
        "pixel_values": inputs["pixel_values"].repeat(len(ids), 1, 1, 1),
    }  # fmt: skip
    found = []
    with saap.attached(model, budget=FULL) as saap_model:
        for cache in (DynamicCache(config=model.config), saap_model.cache()):
            model(text, attention_mask=mask[:, :30], **hf.over(cache))
            parts = [model(**inputs, **hf.over(cache)).logits]
            whole = mask
            for n in range(4):
                whole = torch.cat([whole, torch.ones_like(whole[:, :1])], 1)
                given = {"attention_mask": whole, **hf.over(cache)}
                parts.append(model(text[:, n : n + 1], **given).logits)
            found.append(torch.cat(parts, 1))
    real = torch.cat([mask[:, 30:], torch.ones(len(ids), 4)], 1).bool()
    assert_same_logits(found[1][real], found[0][real])


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_tokens_of_an_image_see_later_ones_in_windows_alone(implementation, padded):
    """As Gemma 4 has it: the mask of full attention is causal, or there is none."""
    model = with_images("gemma4")
    model.set_attn_implementation(implementation)
    tokens = prompt(2, 60).clamp(max=80)
    kinds = torch.zeros_like(tokens)
    kinds[:, 15:20] = kinds[1, 40:44] = 1
    mask = torch.ones_like(tokens)
    if padded:
        mask[1] = torch.arange(60) >= 9
    given = {"attention_mask": mask} if padded else {}
    own = DynamicCache(config=model.config)
    own = model(tokens, mm_token_type_ids=kinds, **given, **hf.over(own)).logits
    causal = model(tokens, **given).logits
    with saap.attached(model, budget=FULL) as saap_model:
        cache = saap_model.cache()
        found = model(tokens, mm_token_type_ids=kinds, **given, **hf.over(cache)).logits
    real = mask.bool()
    assert (own - causal)[real].abs().max() > 1e-3
    assert_same_logits(found[real], own[real])


@torch.no_grad()
@pytest.mark.parametrize("directory", [False, True])
def test_positions_go_on_after_an_image(tmp_path, directory):
    """There are fewer of them than tokens: in a saved context, and after tokens were taken out."""
    skip_if_refused("qwen3_vl")
    model, inputs = with_images("qwen3_vl"), about_an_image("qwen3_vl")
    ids, more = inputs["input_ids"], prompt(1, 6).clamp(max=80)
    own = DynamicCache(config=model.config)
    model(**inputs, **hf.over(own))
    expected = torch.cat([model(t, **hf.over(own)).logits for t in more.split(1, 1)], 1)
    path = tmp_path / "context"
    with saap.attached(model, budget=FULL) as saap_model:
        cache = saap_model.cache(directory=path if directory else None)
        model(**inputs, **hf.over(cache))
        saap_model.save_context(cache, ids[0], path)
        cache.close()
        again = saap_model.open_context(path)[0]
        for _ in range(2):
            assert again.last_positions == [ids.shape[1] - 1 - 2]
            found = torch.cat([model(t, **hf.over(again)).logits for t in more.split(1, 1)], 1)
            assert_same_logits(found, expected)
            again.crop(-6)
        again.close()


@torch.no_grad()
def test_positions_of_generate_are_those_that_are_saved(tmp_path):
    """It counts slots beside the positions on axes."""
    skip_if_refused("qwen3_vl")
    model, inputs, path = with_images("qwen3_vl"), about_an_image("qwen3_vl"), tmp_path / "saved"
    with saap.attached(model, budget=FULL) as saap_model:
        cache = saap_model.cache()
        tokens = generated(model, inputs, max_new_tokens=4, **hf.over(cache))
        saap_model.save_context(cache, tokens[0, :-1], path)
        again = saap_model.open_context(path)[0]
        found = [model(tokens[:, -1:], **hf.over(own)).logits for own in (again, cache)]
    assert_same_logits(*found)


def test_drafts_of_transformers_after_an_image():
    skip_if_refused("qwen3_vl")
    model, inputs = with_images("qwen3_vl"), about_an_image("qwen3_vl")
    options = {"max_new_tokens": 12, "prompt_lookup_num_tokens": 3}
    expected = generated(model, inputs, **options)
    with saap.attached(model, budget=FULL) as saap_model:
        found = generated(model, inputs, **options, **hf.over(saap_model.cache()))
    assert torch.equal(found, expected)


@torch.no_grad()
def test_what_an_image_does_not_allow_is_refused():
    model, inputs = with_images("gemma3"), about_an_image("gemma3")
    budget = Budget(nprobe=2, n_sink=4, window=8, flush_every=8)
    with saap.attached(model, budget=budget, method="kmeans-online") as saap_model:
        cache = saap_model.cache()
        with pytest.raises(ValueError, match=r"in time order, .* got 'kmeans-online'$"):
            model(**inputs, **hf.over(cache))
        assert cache.lengths == []


def test_rows_that_a_mask_shows():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, h, n, 8, generator=generator) for h, n in ((4, 30), (2, 70), (2, 70))
    )
    visible = torch.rand(2, 30, 70, generator=generator) < 0.5
    visible[1, 3] = False
    out, lse = attend_visible(q, k, v, visible, sm_scale=0.3, softcap=5.0)
    keys, values = (t.double().repeat_interleave(2, 1) for t in (k, v))
    scores = 5 * torch.tanh(q.double() @ keys.mT * 0.3 / 5)
    scores = scores.masked_fill(~visible[:, None], -torch.inf)
    expected = scores.softmax(-1).nan_to_num(0.0) @ values
    assert (out - expected).abs().max() < 1e-5
    seen = visible.any(-1)[:, None].expand_as(lse)
    assert (lse - scores.logsumexp(-1))[seen].abs().max() < 1e-5
    assert (lse[~seen] == -torch.inf).all()
    assert (out[1, :, 3] == 0).all()


def causal(tokens, slots):
    """A mask of every token and slot, as a model makes it. `tokens [B, N]`."""
    n = tokens.shape[1]
    return (tokens[:, None] & torch.ones(n, n).tril().bool())[:, None, slots:]


@pytest.mark.parametrize("slots", [0, 90])
@pytest.mark.parametrize("floats", [False, True])
def test_tokens_of_a_whole_mask(slots, floats):
    tokens = torch.arange(200) >= torch.tensor([0, 7, 150])[:, None]
    mask = causal(tokens, slots)
    mask[2, :, : 150 - slots] = True  # padding may see anything
    given = torch.where(mask, 0.0, -3e38) if floats else mask
    for whole in (given, {"sliding_attention": None, "full_attention": given}):
        found = masks.masks_of(whole, 3, slots, 200 - slots)
        assert torch.equal(found.tokens, tokens)
        assert found.visible == {}
    given[1, :, 100 - slots, 120] = 0.0 if floats else True
    both = {"full_attention": given, "sliding_attention": given}
    found = masks.masks_of(both, 3, slots, 200 - slots)
    assert torch.equal(found.tokens, tokens)
    assert set(found.visible) == {"full_attention", "sliding_attention"}
    shown = found.of_kind("full_attention", 5)
    assert torch.equal(shown, mask[:, 0, -5:])
    assert found.of_kind("other", 5) is None


def test_a_mask_that_hides_earlier_tokens_is_refused():
    tokens = torch.arange(200) >= torch.tensor([0, 7])[:, None]
    mask = causal(tokens, 90)
    mask[1, 0, 50, 30] = False
    with pytest.raises(ValueError, match="every token must see all those before it; got a mask"):
        masks.masks_of(mask, 2, 90, 110)


@pytest.mark.parametrize(
    ("mask", "got"), [(torch.ones(1, 2, 5, 5), r"\(1, 2, 5, 5\)"), ("flex", "str")]
)
def test_a_mask_of_another_form_is_refused(mask, got):
    with pytest.raises(ValueError, match=rf"\[B, cached \+ new\] or \[B, 1, 5, 5\]; got {got}"):
        masks.masks_of(mask, 1, 0, 5)


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda mask: mask.long(), "torch.int64$"),
        (lambda mask: mask.float(), "torch.float32 of other values"),
        (lambda mask: torch.where(mask, 0.0, -1.0), "torch.float32 of other values"),
        (lambda mask: mask * torch.nan, "torch.float32 of other values"),
    ],
)
def test_a_mask_that_weighs_slots_is_refused(change, got):
    mask = causal(torch.ones(1, 20).bool(), 0)
    with pytest.raises(ValueError, match=rf"must be bool, or floats of 0 and of .*; got {got}"):
        masks.masks_of(change(mask), 1, 0, 20)


def test_a_mask_of_one_sequence_is_that_of_all():
    mask = causal(torch.ones(1, 20).bool(), 0)
    assert masks.masks_of(mask, 3, 0, 20).tokens.shape == (3, 20)
    with pytest.raises(ValueError, match=r"got \(2, 1, 20, 20\)"):
        masks.masks_of(mask.repeat(2, 1, 1, 1), 3, 0, 20)


def test_one_mask_for_windows_and_full_attention_is_refused():
    """transformers would give it to the layers with a window as it is."""
    model, tokens = random_model("gemma3_text", **WINDOWS), prompt(1, 40)
    given = {"attention_mask": causal(torch.ones(1, 40).bool(), 0)}
    with torch.no_grad(), saap.attached(model, budget=FULL) as saap_model:
        cache = saap_model.cache()
        with pytest.raises(ValueError, match="or a mask for each kind of layer; got"):
            model(tokens, **given, **hf.over(cache))


def test_a_mask_of_no_layer_hides_nothing():
    assert masks.masks_of({}, 1, 3, 5).tokens is None
    given = {"full_attention": torch.ones(1, 8), "sliding_attention": None}
    assert masks.masks_of(given, 1, 3, 5).tokens.shape == (1, 8)


def test_text_is_sparse_behind_an_image_part():
    """What a step leaves out changes logits, so the test above is of more than dense steps."""
    model = with_images("mistral3")
    tokens = prompt(1, 700)
    with torch.no_grad(), saap.attached(model, budget=Budget(max_tokens=32)) as saap_model:
        cache = saap_model.cache()
        model(tokens, **hf.over(cache))
        model(tokens[:, :1], **hf.over(cache))
        assert cache.visited_share < 0.2
