"""Families beside those of `test_generate`: over all rows each gives what its own attention does.

Layers without attention keep a state, and what cannot be done with one is refused.
"""

import copy

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, DynamicCache

import saap
from saap import context_file, context_folder, hf
from saap.budget import Budget
from saap.hf import families, options, unsearched
from saap.index import tensor_files
from saap.training import train

from . import test_generate
from .conftest import random_model
from .models_with_images import with_images
from .test_generate import assert_same_logits, generated, logits_of, prompt

pytestmark = pytest.mark.many_steps

FULL = Budget(max_tokens=10_000, n_sink=4, window=8)
WINDOWS = {"sliding_window": 24, "num_hidden_layers": 4}
ONE_FULL = {**WINDOWS, "layer_types": ["sliding_attention", "full_attention"] * 2}
LINEAR = {
    "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SHARED = {
    **WINDOWS, "num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_kv_shared_layers": 4, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16, "v_head_dim": 24, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
}  # fmt: skip
CONVOLUTIONS = {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2}
OPTIONS = {
    "afmoe": {**WINDOWS, **EXPERTS, "num_dense_layers": 1},
    "apertus": {},
    "apertus1p5_text": {},
    "arcee": {},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "axk1": LATENT,
    "bailing_hybrid": {
        **LATENT,
        "num_hidden_layers": 4,
        "num_experts": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "bamba": {
        "num_hidden_layers": 4,
        "attn_layer_indices": [1, 3],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
    },
    "bitnet": {},
    "cohere2_moe": {**WINDOWS, **EXPERTS},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "cwm": {"sliding_window": 24, "num_hidden_layers": 4},
    "dots1": {
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
    },
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
    "exaone": {},
    "exaone_moe": {**WINDOWS, **EXPERTS},
    "falcon_h1": {
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_ssm": 64,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 16,
        "key_multiplier": 0.5,
    },
    "flint": {"sliding_window": 24, "num_hidden_layers": 6},
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "gemma": {},
    "gemma3n_text": {
        **SHARED,
        "altup_num_inputs": 2,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 6,
    },
    "gemma4_text": {
        **WINDOWS,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
        "global_head_dim": 32,
    },
    "gemma4_unified_text": {**SHARED, "global_head_dim": 32},
    "glm": {},
    "glm4_moe": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "glm4_moe_lite": LATENT,
    "granite_swa": ONE_FULL,
    "granitemoe": {"num_local_experts": 4},
    "granitemoe_swa": {**ONE_FULL, "num_local_experts": 4},
    "granitemoehybrid": {
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
    },
    "granitemoeshared": {"num_local_experts": 4},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "hy_v3": {**EXPERTS, "num_hidden_layers": 3},
    "hyperclovax": {},
    "jais2": {},
    "internlm3": {},
    "iquestcoder": {},
    "jetmoe": {},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "kimi_linear": {
        **LATENT,
        "num_hidden_layers": 4,
        "num_experts": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "kolibri1": {**ONE_FULL, **EXPERTS},
    "laguna": {**ONE_FULL, **EXPERTS},
    "lfm2": CONVOLUTIONS,
    "lfm3": CONVOLUTIONS,
    "lfm2_moe": {**CONVOLUTIONS, **EXPERTS, "num_dense_layers": 1},
    "llama4_text": {
        "num_hidden_layers": 4,
        "no_rope_layer_interval": 2,
        "attention_chunk_size": 24,
        "floor_scale": 16,
        "num_local_experts": 4,
        "intermediate_size_mlp": 96,
    },
    "longcat_flash": {
        **LATENT,
        "num_layers": 1,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 32,
        "zero_expert_num": 1,
        "moe_topk": 2,
    },
    "mellum": {**ONE_FULL, **EXPERTS},
    "minicpm3": LATENT,
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "ministral": ONE_FULL,
    "ministral3": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "nemotron": {},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "num_hidden_layers": 4,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
    },
    "olmo": {},
    "olmo_hybrid": {**LINEAR, "linear_num_value_heads": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_5_moe_text": {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_5_text": LINEAR,
    "qwen3_moe": EXPERTS,
    "qwen3_next": {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 32},
    "sarvam_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "sarvam_mla": {**LATENT, "num_experts": 4},
    "solar_open": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "vaultgemma": WINDOWS,
    "youtu": LATENT,
    "zaya": {"num_experts": 4, "moe_intermediate_size": 32, "router_hidden_size": 16},
}
WITH_IMAGES = (
    "mistral4",
    "qwen2_5_vl_text",
    "qwen2_vl_text",
    "qwen3_vl_moe_text",
    "qwen3_vl_text",
)
SHARING = ("gemma3n_text", "gemma4_unified_text")
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
STATEFUL = ("qwen3_5_text", "lfm2", "nemotron_h", "falcon_h1", "zaya")


def make(family):
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {family}")
    if (family in SHARING and VERSION < (5, 23)) or (family in WITH_IMAGES and VERSION < (5, 22)):
        pytest.skip("this version of transformers is refused")
    if family in WITH_IMAGES:
        return with_images(family.removesuffix("_text"))
    return random_model(family, **OPTIONS[family])


@pytest.fixture(scope="module", params=[*OPTIONS, *WITH_IMAGES])
def model(request):
    return make(request.param)


@pytest.fixture(scope="module", params=STATEFUL)
def stateful(request):
    return make(request.param)


def test_every_family_is_tested():
    tested = {name for name, _ in test_generate.FAMILIES.values()}
    assert set(families.FAMILIES) == tested | {*OPTIONS, *WITH_IMAGES}


def test_rows_are_searched(model):
    layers = hf.model_layers(model)
    assert 0 < sum(layer.is_full for layer in layers) <= len(layers) == len(saap_layers(model))


def saap_layers(model):
    with saap.attached(model, budget=FULL) as saap_model:
        return saap_model.cache().layers


@pytest.mark.parametrize("padded", [False, True])
def test_all_rows_have_the_logits_of_dense(model, padded):
    tokens, mask = prompt(3 if padded else 1), None
    if padded:
        mask = (torch.arange(70) >= torch.tensor([0, 45, 9])[:, None]).long()
    real = torch.ones(tokens.shape).bool() if mask is None else mask.bool()
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    cuts = (30, *range(60, 70))
    expected = logits_of(eager, tokens, mask, cuts, DynamicCache(config=model.config))
    with saap.attached(model, budget=FULL) as saap_model:
        ours = logits_of(model, tokens, mask, cuts, saap_model.cache())
    assert_same_logits(ours[real], expected[real])


def test_greedy_tokens_are_those_of_dense(model):
    mask = (torch.arange(40) >= torch.tensor([0, 33])[:, None]).long()
    inputs = {"input_ids": prompt(2, 40), "attention_mask": mask}
    expected = generated(model, inputs, max_new_tokens=12)
    with saap.attached(model, budget=FULL) as saap_model:
        cache = saap_model.cache()
        found = generated(model, inputs, max_new_tokens=12, **hf.over(cache))
        assert torch.equal(found, expected)
        assert cache.lengths == [51, 18]
        assert cache.nbytes > 0


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True}])
def test_a_state_is_reordered_with_its_sequence(stateful, options):
    inputs = {"input_ids": prompt(2, 40), "attention_mask": torch.ones(2, 40).long()}
    expected = generated(stateful, inputs, max_new_tokens=12, **options)
    with saap.attached(stateful, budget=FULL) as saap_model:
        found = generated(
            stateful, inputs, max_new_tokens=12, **options, **hf.over(saap_model.cache())
        )
    assert torch.equal(found, expected)


def test_drafts_over_states_of_convolutions():
    """transformers asks them to record the past first; it refuses to draft over other states."""
    model = make("lfm2")
    tokens = prompt(1, 12, seed=8).repeat(1, 5)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    expected = generated(model, inputs, prompt_lookup_num_tokens=4)
    with saap.attached(model, budget=FULL) as saap_model:
        cache = saap_model.cache()
        found = generated(model, inputs, prompt_lookup_num_tokens=4, **hf.over(cache))
    assert torch.equal(found, expected)


@torch.no_grad()
def test_copies_and_choices_of_sequences_keep_their_states(stateful):
    tokens = prompt(2, 50)
    own = stateful(torch.cat([tokens, tokens[:, :1]], 1)).logits[:, -1]
    with saap.attached(stateful, budget=FULL) as saap_model:
        cache = saap_model.cache()
        stateful(tokens, **hf.over(cache))
        held = sum(unsearched.state_bytes(state) for state in cache.states)
        assert 0 < held < cache.nbytes
        other, more = copy.deepcopy(cache), copy.deepcopy(cache)
        other.batch_select_indices(torch.tensor([1]))
        more.batch_repeat_interleave(2)
        for chosen, kept in ((other, [1]), (more, [0, 0, 1, 1]), (cache, [0, 1])):
            found = stateful(tokens[kept, :1], **hf.over(chosen)).logits[:, -1]
            assert_same_logits(found, own[kept])
        cache.reset()
        assert_same_logits(stateful(tokens, **hf.over(cache)).logits[:, -1], logits(stateful))


def logits(model):
    return model(prompt(2, 50)).logits[:, -1]


@torch.no_grad()
def test_a_context_that_was_read_goes_on_and_is_rewound(stateful):
    tokens = prompt(1, 60)[0]
    own = stateful(tokens[None]).logits[0, 40:]
    read = hf.read_context(stateful, tokens[:40], chunk=16)
    with saap.attached(stateful, budget=FULL) as saap_model:
        cache = hf.cache_from(saap_model, read, 60)
        for _ in range(2):
            found = [stateful(t[None, None], **hf.over(cache)).logits[0, -1] for t in tokens[40:]]
            assert_same_logits(torch.stack(found), own)
            hf.rewind(cache, read)
    theirs = hf.dynamic_cache_from(stateful, read)
    assert_same_logits(stateful(tokens[None, 40:], **hf.over(theirs)).logits[0], own)


@torch.no_grad()
@pytest.mark.parametrize(
    "family", [*STATEFUL, "gemma4_text", "llama4_text", "deepseek_v3", "kimi_linear"]
)
@pytest.mark.parametrize("directory", [False, True])
def test_a_saved_context_goes_on(tmp_path, family, directory):
    model, tokens, path = make(family), prompt(1, 60), tmp_path / "context"
    own = model(tokens).logits[:, 40:]
    with saap.attached(model, budget=FULL) as saap_model:
        cache = saap_model.cache(directory=path if directory else None)
        model(tokens[:, :40], **hf.over(cache))
        saap_model.save_context(cache, tokens[0, :40], path)
        if directory:
            model(tokens[:, 40:50], **hf.over(cache))  # what is not saved is not opened
            cache.close()
        again, held = saap_model.open_context(path)
        assert torch.equal(held, tokens[0, :40])
        assert_same_logits(model(tokens[:, 40:], **hf.over(again)).logits, own)
        again.close()


ALTERED = {
    "qwen3_5_text": (("state.conv_states.0",), r"layer 0 must have a state of .*; got "),
    "gemma4_text": (
        ("keys", "values"),
        r"layer 0 must have KV heads, dimensions and dtype \[2, 16, .*; got ",
    ),
}
OTHERS = {"gemma4_text": {"state": True}, "qwen3_5_text": {"cumulative_length": 40}}


def saved(saap_model, tokens, path, directory):
    """The file of a new context of these tokens that tells of its layers, and what it holds."""
    cache = saap_model.cache(directory=path if directory else None)
    saap_model.model(tokens, **hf.over(cache))
    saap_model.save_context(cache, tokens[0], path)
    cache.close()
    file = path / context_folder.STATE if directory else path
    kind = context_folder.FORMAT if directory else context_file.FORMAT
    return file, kind, *tensor_files.read(file, kind)


@torch.no_grad()
@pytest.mark.parametrize("family", ALTERED)
@pytest.mark.parametrize("directory", [False, True])
def test_an_altered_layer_that_is_not_searched_is_refused(tmp_path, family, directory):
    model, tokens, path = make(family), prompt(1, 40), tmp_path / "context"
    with saap.attached(model, budget=FULL) as saap_model:
        file, kind, header, tensors = saved(saap_model, tokens, path, directory)
        names, refusal = ALTERED[family]
        for change in (lambda t: t[:, 1:], lambda t: t[..., 1:], lambda t: t.half()):
            altered = {f"layers.0.{name}": change(tensors[f"layers.0.{name}"]) for name in names}
            tensor_files.write(file, kind, header, tensors | altered)
            with pytest.raises(ValueError, match=refusal):
                saap_model.open_context(path)
        tensors = {n: t for n, t in tensors.items() if not n.startswith("layers.0.")}
        if "state" not in OTHERS[family]:
            tensors |= {f"layers.0.{n}": torch.zeros(1, 2, 3, 16) for n in ("keys", "values")}
        header["layers"][0] = OTHERS[family]
        tensor_files.write(file, kind, header, tensors)
        with pytest.raises(ValueError, match="layer 0 must be of the kind that the model has"):
            saap_model.open_context(path)


def test_complex_rope_of_searched_layers_is_refused():
    model = random_model("llama4_text", **OPTIONS["llama4_text"] | {"attention_chunk_size": None})
    with pytest.raises(ValueError, match="got complex numbers, in layer 0 of llama4_text"):
        hf.model_layers(model)


def test_no_index_is_trained_over_windows_in_chunks(tiny_tokens):
    with pytest.raises(ValueError, match="got one with a window in chunks, layer 0"):
        train(make("llama4_text"), tiny_tokens, nlist=8, steps=2)


@torch.no_grad()
@pytest.mark.parametrize("directory", [False, True])
def test_an_altered_state_beside_attention_is_refused(tmp_path, directory):
    model, tokens, path = make("falcon_h1"), prompt(1, 40), tmp_path / "context"
    with saap.attached(model, budget=FULL) as saap_model:
        file, kind, header, tensors = saved(saap_model, tokens, path, directory)
        name = "layers.1.state.recurrent_states.0"
        others = {n: t for n, t in tensors.items() if n != name}
        for altered in (others, others | {name: tensors[name].double()}):
            tensor_files.write(file, kind, header, altered)
            with pytest.raises(ValueError, match=r"layer 1 must have a state of .*; got "):
                saap_model.open_context(path)


@torch.no_grad()
def test_what_a_state_does_not_allow_is_refused(stateful, tiny_tokens):
    tokens = prompt(1, 50)
    with pytest.raises(ValueError, match=r"verify must be None .* got .*4.* and layer 0 of kind"):
        saap.attached(stateful, budget=FULL, verify=4).__enter__()
    with saap.attached(stateful, budget=FULL) as saap_model:
        cache = saap_model.cache()
        stateful(tokens, **hf.over(cache))
        cache.crop(0)
        with pytest.raises(ValueError, match="must keep no state for its cache to be crop"):
            cache.crop(-3)
        assert cache.lengths == [50]
    with pytest.raises(ValueError, match=r"as training does; got one .* layer 0"):
        train(stateful, tiny_tokens, nlist=8, steps=2)


@torch.no_grad()
def test_a_broken_forward_is_not_gone_on_from(stateful, monkeypatch):
    """A state has moved on by then, and no count of slots tells."""
    tokens = prompt(1, 50)
    block = stateful.model.layers[-1]
    last = next(getattr(block, n) for n in ("mlp", "feed_forward", "mixer") if hasattr(block, n))
    with saap.attached(stateful, budget=FULL) as saap_model:
        cache = saap_model.cache()
        stateful(tokens, **hf.over(cache))
        with monkeypatch.context() as patched:
            patched.setattr(last, "forward", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                stateful(tokens[:, :1], **hf.over(cache))
        with pytest.raises(ValueError, match="a forward was broken off: start a new cache"):
            stateful(tokens[:, :1], **hf.over(cache))
        cache.reset()
        stateful(tokens, **hf.over(cache))


@pytest.mark.parametrize(
    ("family", "options", "variants"),
    [
        ("olmo_hybrid", {"rope_parameters": {"rope_type": "default", "rope_theta": None}}, [None]),
        ("granite_swa", {"layer_rope_theta": [1e4, 0, 1e4, 5e5]}, [None, "half"]),
    ],
)
def test_layers_without_rope_or_with_one_of_their_own(family, options, variants):
    """As released models have them; all rows give what dense attention gives."""
    model = random_model(family, **{**OPTIONS[family], **options})
    full = [layer for layer in hf.model_layers(model) if layer.is_full]
    assert [layer.rope_variant for layer in full] == variants
    if family == "granite_swa":
        assert full[0].info.inv_freq is None
        assert torch.allclose(full[1].info.inv_freq[1], torch.tensor(5e5 ** (-1 / 8)), rtol=1e-4)
    test_all_rows_have_the_logits_of_dense(model, padded=True)
    test_greedy_tokens_are_those_of_dense(model)


def test_searched_heads_of_several_sizes_are_not_saved(monkeypatch):
    model = random_model("llama")
    monkeypatch.setattr(options, "heads_of", lambda _, layer: (4, 2, 16 + 16 * layer))
    with pytest.raises(ValueError, match=r"as each other .* got \(2, 16\) and \(2, 32\)"):
        options.check_can_be_saved(model, hf.model_layers(model))
