"""`generate()` over a SaapCache: families x paths, each against the model's own attention."""

import copy

import pytest
import torch

import saap
from saap import hf
from saap.budget import Budget
from saap.hf import cache_argument
from saap.trained_index import LayerIndex, TrainedIndex

from .conftest import random_model

NLIST = 8
FULL = Budget(nprobe=NLIST, n_sink=4, window=8, flush_every=8)
SMALL = Budget(nprobe=1, n_sink=4, window=8, flush_every=8)

GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": 24}
FAMILIES = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    "phi3": ("phi3", {}),
    "gemma2": ("gemma2", {**GEMMA, "attn_logit_softcapping": 2.0}),
    "gemma3": ("gemma3_text", {**GEMMA, "layer_types": ["sliding_attention", "full_attention"]}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "gpt_oss": (
        "gpt_oss",
        {"sliding_window": 24, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", {"sliding_window": 24, "num_hidden_layers": 4}),
    "glm4": ("glm4", {}),
    "granite": ("granite", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 24, "num_hidden_layers": 4}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
    "exaone4": ("exaone4", {"sliding_window": 24, "num_hidden_layers": 4}),
    "seed_oss": ("seed_oss", {}),
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 60,
}  # fmt: skip
ROPES = {
    "linear": ("llama", {"rope_type": "linear", "factor": 2.0}, {}),
    "dynamic": ("llama", {"rope_type": "dynamic", "factor": 2.0}, {"max_position_embeddings": 60}),
    "yarn": ("llama", YARN, {}),
    "llama3": ("llama", LLAMA3, {}),
    "longrope": ("phi3", LONG, {"original_max_position_embeddings": 60}),
    "partial": ("phi3", {"rope_type": "default", "partial_rotary_factor": 0.5}, {}),
}


def make(family):
    if family in ROPES:
        name, rope, options = ROPES[family]
        return random_model(name, rope_parameters={"rope_theta": 1e4, **rope}, **options)
    name, options = FAMILIES[family]
    model = random_model(name, **options)
    if name == "gpt_oss":
        for module in hf.attention_modules(model).values():
            torch.nn.init.normal_(module.sinks, std=2.0)
    return model


def random_index(model, nlist=NLIST):
    """A partition of random directions: enough to show that what is visited is exact."""
    about = hf.describe(model)
    generator = torch.Generator().manual_seed(0)
    shape = (about["num_kv_heads"], nlist, about["head_dim"])
    layers = tuple(
        LayerIndex(torch.nn.functional.normalize(torch.randn(shape, generator=generator), dim=-1))
        for _ in range(about["num_layers"])
    )
    metadata = {
        "model": about, "nlist": nlist, "router": "centroid", "n_sink": 4, "window": 16,
        "n_segments": 1, "interleaved": False, "sm_scale": [1.0] * len(layers),
    }  # fmt: skip
    return TrainedIndex(layers, metadata)


def prompt(batch=1, length=70, seed=3):
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=[*FAMILIES, *ROPES])
def case(request):
    model = make(request.param)
    model.set_attn_implementation("eager")
    return model, random_index(model)


@pytest.fixture(scope="module")
def llama():
    model = make("llama")
    return model, random_index(model)


def assert_same_logits(ours, eager, double=None):
    """At most twice the rounding that the model's own eager attention shows against float64."""
    budget = 64 * torch.finfo(torch.float32).eps * max(1.0, float(eager.abs().max()))
    if double is not None:
        budget += 2 * float((eager.double() - double).abs().max())
    assert float((ours - eager).abs().max()) <= budget


def logits_of(model, tokens, mask=None, cuts=(), cache=None):
    """Logits of all tokens, in chunks that end at `cuts`."""
    found, start = [], 0
    for stop in (*cuts, tokens.shape[1]):
        given = {} if mask is None else {"attention_mask": mask[:, :stop]}
        if mask is not None:
            given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, start:stop]
        with torch.no_grad():
            step = model(tokens[:, start:stop], **hf.over(cache), use_cache=True, **given)
        found.append(step.logits)
        start = stop
    return torch.cat(found, 1)


PATHS = {
    "prefill": (),
    "token by token": tuple(range(40, 70)),
    "chunks": (1, 30, 31, 62),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("padded", [False, True])
def test_full_budget_has_the_logits_of_dense(case, path, padded):
    model, index = case
    tokens = prompt(3 if padded else 1)
    mask = None
    if padded:
        mask = (torch.arange(70) >= torch.tensor([0, 45, 9])[:, None]).long()
    with torch.no_grad():
        given = {} if mask is None else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        eager = model(tokens, attention_mask=mask, **given).logits
    dense_cache = None
    if any(t in str(model.config.rope_parameters) for t in ("dynamic", "longrope")):
        from transformers import DynamicCache

        # Their tables depend on how the sequence came: compare along the same path.
        dense_cache = DynamicCache(config=model.config)
        eager = logits_of(model, tokens, mask, PATHS[path], dense_cache)
    with saap.attached(model, index, FULL, method="blend") as saap_model:
        ours = logits_of(model, tokens, mask, PATHS[path], saap_model.cache())
    real = torch.ones(tokens.shape).bool() if mask is None else mask.bool()
    assert_same_logits(ours[real], eager[real])
    assert model.config._attn_implementation == "eager"


def test_keys_and_queries_lose_their_rope(case, monkeypatch):
    """The same token everywhere: without RoPE its keys and queries are the same everywhere."""
    model, index = case
    seen = []
    attend, append = saap.KVStore.attend, saap.KVStore.append
    monkeypatch.setattr(
        saap.KVStore,
        "append",
        lambda self, k, v, k_derope, mask: (seen.append(k_derope), append(self, k, v, k_derope))[
            1
        ],
    )
    monkeypatch.setattr(
        saap.KVStore,
        "attend",
        lambda self, q, q_derope, *a, **o: (
            seen.append(q_derope),
            attend(self, q, q_derope, *a, **o),
        )[1],
    )
    model = copy.deepcopy(model)
    for module in hf.attention_modules(model).values():
        if hasattr(module, "sinks"):  # they make later tokens weigh more
            torch.nn.init.constant_(module.sinks, -1e9)
    with saap.attached(model, index, FULL, method="blend") as saap_model:
        call(model, saap_model.cache(), torch.full((1, 50), 7))
    assert seen
    for derope in seen:
        assert (derope - derope[:, :, :1]).abs().max() < 1e-4 * float(derope.abs().max())


def generated(model, inputs, **options):
    torch.manual_seed(5)
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": -1, **options}
    return model.generate(**inputs, pad_token_id=0, **options)


def test_greedy_tokens_are_those_of_dense(case):
    model, index = case
    mask = (torch.arange(40) >= torch.tensor([0, 33])[:, None]).long()
    inputs = {"input_ids": prompt(2, 40), "attention_mask": mask}
    expected = generated(model, inputs)
    with saap.attached(model, index, FULL, method="blend") as saap_model:
        cache = saap_model.cache()
        assert torch.equal(generated(model, inputs, **hf.over(cache)), expected)
        # Phi-3 drops a cache where longrope switches tables, and computes everything anew.
        if model.config.rope_parameters.get("rope_type") != "longrope":
            assert cache.lengths == [63, 30]
        assert torch.equal(generated(model, inputs), expected), "without our cache"


@pytest.mark.filterwarnings("ignore:.*past_key_values")
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_under_either_name(llama, name):
    """transformers has called it `cache` since 5.24, and takes the old name, too."""
    if name == "cache" != cache_argument.NAME:
        pytest.skip("this version of transformers knows the old name alone")
    model, index = llama
    tokens = prompt(1, 60)
    expected = generated(model, {"input_ids": tokens})
    with (
        saap.attached(model, index, FULL, method="blend") as saap_model,
        torch.no_grad(),
    ):
        cache = saap_model.cache()
        assert torch.equal(generated(model, {"input_ids": tokens}, **{name: cache}), expected)
        assert cache.lengths == [83]
        other = saap_model.cache()
        model(tokens, **{name: other})
        assert other.lengths == [60]
    assert cache_argument.given({name: cache, "use_cache": True}) is cache
    assert cache_argument.given({"use_cache": True}) is None


DECODING = {
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "chunked prefill": {"prefill_chunk_size": 16},
    "assisted": {"assistant_model": ...},
}


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("decoding", DECODING)
def test_decoding(family, decoding):
    model = make(family)
    options = dict(DECODING[decoding])
    if decoding == "assisted":
        # Agrees now and then: some drafts are taken, some are cut off again.
        options["assistant_model"] = copy.deepcopy(model)
        torch.nn.init.normal_(options["assistant_model"].model.norm.weight, 1.0, 0.2)
    single = decoding in ("prompt lookup", "assisted")
    tokens = prompt(1, 12, seed=8).repeat(1, 5) if single else prompt(2, 60, seed=4)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    expected = generated(model, inputs, **options)
    with saap.attached(model, random_index(model), FULL, method="blend") as saap_model:
        ours = generated(model, inputs, **hf.over(saap_model.cache()), **options)
        assert torch.equal(ours, expected)
        assert torch.equal(generated(model, inputs, **options), expected)


def test_streaming(llama):
    from transformers.generation.streamers import BaseStreamer

    class Kept(BaseStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    model, index = llama
    kept = Kept()
    inputs = {"input_ids": prompt(), "attention_mask": torch.ones(1, 70).long()}
    with saap.attached(model, index, FULL, method="blend") as saap_model:
        found = generated(model, inputs, **hf.over(saap_model.cache()), streamer=kept)
    assert kept.tokens == [*found[0].tolist(), "end"]


@pytest.mark.parametrize("family", ["llama", "gemma3", "smollm3"])
def test_next_turn_over_the_same_cache(family):
    model = make(family)
    model.set_attn_implementation("eager")
    tokens = prompt(1, 50)
    with saap.attached(model, random_index(model), FULL, method="blend") as saap_model:
        cache = saap_model.cache()
        for turn in range(3):
            inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
            ours = generated(model, inputs, **hf.over(cache), max_new_tokens=9)
            assert torch.equal(ours, generated(model, inputs, max_new_tokens=9))
            tokens = torch.cat([ours, prompt(1, 11, seed=turn)], 1)


def test_small_budget_differs_and_is_the_same_however_it_came(llama):
    model, index = llama
    tokens = prompt(1, 90)
    with saap.attached(model, index, SMALL, method="blend") as saap_model:
        cache = saap_model.cache()
        found = [
            logits_of(model, tokens, cuts=cuts, cache=c)[:, -1]
            for cuts, c in (((89,), cache), ((30, 60, 89), saap_model.cache(capacity=90)))
        ]
        assert cache.visited_share < 0.6
        assert cache.nbytes > 90 * 2 * 2 * 2 * 16 * 4
    with torch.no_grad():
        dense = model(tokens).logits[:, -1]
    assert_same_logits(found[0], found[1])
    assert (found[0] - dense).abs().max() > 1e-4


def test_default_budget(llama):
    with saap.attached(*llama) as saap_model:
        assert saap_model.budget == Budget.default() == Budget(max_tokens=4096, dense_below=16384)


def test_dense_layers_are_dense(llama):
    model, index = llama
    tokens = prompt(1, 90)
    budget = Budget(nprobe=1, n_sink=4, window=8, flush_every=8, dense_layers=(0, 1))
    with torch.no_grad(), saap.attached(model, index, budget, method="blend") as saap_model:
        ours = logits_of(model, tokens, cuts=(89,), cache=saap_model.cache())
        assert_same_logits(ours, model(tokens).logits)


def call(model, cache, tokens=None, **options):
    with torch.no_grad():
        return model(prompt(1, 4) if tokens is None else tokens, **hf.over(cache), **options)


BAD_FORWARDS = {
    "batch": ({"tokens": prompt(2, 1)}, "the batch must be 1, as in the cache; got 2"),
    "positions": (
        {"position_ids": torch.arange(3, 7)[None]},
        "position_ids must ascend; got 3 after 29",
    ),
    "positions within": (
        {"position_ids": torch.tensor([[40, 41, 41, 42]])},
        "position_ids must ascend",
    ),
    "short mask": (
        {"attention_mask": torch.ones(1, 4)},
        r"attention_mask must be \[B, cached \+ new\] = \(1, 34\); got \(1, 4\)",
    ),
    "mask of cached tokens": (
        {"attention_mask": (torch.arange(34) > 2)[None].long()},
        r"attention_mask must show \[34\] tokens, with those cached; got \[31\]",
    ),
    "padding on the right": (
        {"attention_mask": (torch.arange(34) < 33)[None].long()},
        "padding must be on the left; got a mask",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", BAD_FORWARDS)
def test_bad_forward_is_refused_and_loses_nothing(llama, wrong):
    model, index = llama
    options, message = BAD_FORWARDS[wrong]
    tokens = prompt(1, 34)
    with saap.attached(model, index, FULL, method="blend") as saap_model:
        cache = saap_model.cache()
        call(model, cache, tokens[:, :30])
        with pytest.raises(ValueError, match=message):
            call(model, cache, **options)
        ours = call(model, cache, tokens[:, 30:]).logits
    with torch.no_grad():
        assert_same_logits(ours, model(tokens).logits[:, 30:])


def test_cache_of_another_model_or_block(llama):
    model, index = llama
    other = make("qwen2")
    with saap.attached(model, index, FULL, method="blend") as saap_model:
        cache = saap_model.cache()
        call(model, cache)
        with pytest.raises(ValueError, match="this SaapCache must be used by its attached model"):
            call(other, cache)
        with (
            saap.attached(other, random_index(other), FULL, method="blend"),
            pytest.raises(ValueError, match="this SaapCache must belong to this model"),
        ):
            call(other, cache)
        with (
            pytest.raises(ValueError, match="must be attached once at a time"),
            saap.attached(model, index, FULL, method="blend"),
        ):
            pass
        with (
            pytest.raises(ValueError, match="must be trained for this model"),
            saap.attached(other, index, FULL, method="blend"),
        ):
            pass
    with pytest.raises(ValueError, match="or after that block"):
        call(model, cache)
    with (
        saap.attached(model, index, FULL, method="blend"),
        pytest.raises(ValueError, match="must belong to this model and block"),
    ):
        call(model, cache)
    assert model.config._attn_implementation == "sdpa"
    assert "forward" not in vars(model.model)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_broken_forward_is_not_continued(llama, monkeypatch):
    model, index = llama
    with saap.attached(model, index, FULL, method="blend") as saap_model:
        cache = saap_model.cache()
        call(model, cache)
        with monkeypatch.context() as patched:
            patched.setattr(model.model.layers[1].mlp, "forward", lambda x: 1 / 0)
            patched.setattr(model.model.layers[0].mlp, "forward", lambda x: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                call(model, cache)
        with pytest.raises(ValueError, match="was broken off"):
            call(model, cache)
        call(model, saap_model.cache())
    assert model.config._attn_implementation == "sdpa"


def test_no_memory_for_a_forward_loses_nothing(llama, monkeypatch):
    model, index = llama
    tokens = prompt(1, 200)
    with saap.attached(model, index, FULL, method="blend") as saap_model:
        cache = saap_model.cache()
        call(model, cache, tokens[:, :30])
        real = torch.empty

        def scarce(shape, *rest, **options):
            if isinstance(shape, tuple) and len(shape) == 4 and shape[2] > 150:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return real(shape, *rest, **options)

        monkeypatch.setattr(torch, "empty", scarce)
        with pytest.raises(MemoryError, match="its 30 tokens are kept"):
            call(model, cache, tokens[:, 30:])
        ours = call(model, cache, tokens[:, 30:40]).logits
    with torch.no_grad():
        assert_same_logits(ours, model(tokens[:, :40]).logits[:, 30:])


def test_crop_below_the_sinks(llama):
    model, index = llama
    with saap.attached(model, index, FULL, method="blend") as saap_model:
        cache = saap_model.cache()
        call(model, cache, prompt(1, 30))
        with pytest.raises(ValueError, match=r"must leave 0 or 4 to 30 tokens.*got 2 of 30"):
            cache.crop(-28)
        with pytest.raises(ValueError, match=r"crop takes 0 or less.*got 3"):
            cache.crop(3)
        cache.crop(-10)
        tokens = torch.cat([prompt(1, 30)[:, :20], prompt(1, 9)], 1)
        ours = call(model, cache, tokens[:, 20:]).logits
    with torch.no_grad():
        assert_same_logits(ours, model(tokens).logits[:, 20:])


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("doge", {}, "model_type must be one of afmoe, apertus, .*; got 'doge'"),
        ("gpt2", {}, "with a rotary position embedding .*; got model_type='gpt2'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(family, options, message):
    model = random_model(family, **options)
    with (
        pytest.raises(ValueError, match=message),
        saap.attached(model, fitting(model), FULL, method="blend"),
    ):
        pass


def fitting(model):
    try:
        return random_index(model)
    except ValueError:  # describe() refuses it, as attached does first
        return random_index(make("llama"))


def test_unknown_rope_is_refused_by_name(monkeypatch):
    model = make("llama")
    index = random_index(model)
    model.config.rope_parameters["rope_type"] = "spiral"
    index.metadata["model"]["rope"]["rope_type"] = "spiral"
    with (
        pytest.raises(
            ValueError, match=r"rope_type must be one of default, linear, .*; got 'spiral'"
        ),
        saap.attached(model, index, FULL, method="blend"),
    ):
        pass


def test_budget_that_does_not_fit_the_index(llama):
    model, index = llama
    for budget, message in (
        (Budget(nprobe=9), r"nprobe must be in 1\.\.8; got 9"),
        (Budget(nprobe=1, dense_layers=(2,)), r"dense_layers must be in 0\.\.1; got \(2,\)"),
    ):
        with (
            pytest.raises(ValueError, match=message),
            saap.attached(model, index, budget, method="blend"),
        ):
            pass
    with (
        pytest.raises(ValueError, match=r"router must be one that was trained, .*; got 'mlp'"),
        saap.attached(model, index, FULL, method="mlp"),
    ):
        pass


@pytest.mark.bad_input
def test_a_full_window_whose_past_was_not_kept_is_not_cropped():
    model = make("gemma3")
    with saap.attached(model, None, SMALL, method="quest") as saap_model:
        cache = saap_model.cache()
        generated(model, {"input_ids": prompt(1, 40)}, **hf.over(cache), max_new_tokens=4)
        held = cache.lengths
        with pytest.raises(ValueError, match=r"activate_past_recording\(\) must be called before"):
            cache.crop(-2)
        assert cache.lengths == held  # no layer was cut
        cache = saap_model.cache()
        cache.activate_past_recording()
        generated(model, {"input_ids": prompt(1, 40)}, **hf.over(cache), max_new_tokens=4)
        cache.crop(-2)
        assert cache.lengths == [held[0] - 2]
