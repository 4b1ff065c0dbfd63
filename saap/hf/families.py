"""All that is known of each layer of a model: the only place with rules about model families.

Training, evaluation and decoding ask here for windows, RoPE and learned sinks. A model that is not
supported is refused by name, before any forward.
"""

import copy
import inspect
import itertools
from dataclasses import dataclass

import torch
import transformers
from torch import nn

from saap.rope import INTERLEAVED, frequencies
from saap.selector import LayerInfo

from . import latent
from .models import (
    HYBRID,
    NOTHING,
    STATES,
    attention_modules,
    layer_kinds,
    rope_variant,
    rotary_modules,
    shared_layers,
)

FAMILIES = (
    "afmoe", "apertus", "apertus1p5_text", "arcee", "aria_text", "axk1", "bailing_hybrid",
    "bamba", "bitnet", "cohere", "cohere2", "cohere2_moe", "cwm", "deepseek_v2", "deepseek_v3",
    "dots1", "ernie4_5", "ernie4_5_moe", "exaone", "exaone4", "exaone_moe", "falcon_h1",
    "flex_olmo", "flint", "gemma", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text",
    "gemma4_unified_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "gpt_oss", "granite",
    "granite_swa", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared",
    "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hyperclovax", "internlm3",
    "iquestcoder", "jais2", "jamba", "jetmoe", "kimi_linear", "kolibri1", "laguna", "lfm2",
    "lfm2_moe", "lfm3", "llama", "llama4_text", "longcat_flash", "mellum", "minicpm3",
    "minimax_m2", "ministral", "ministral3", "mistral", "mistral4", "mixtral", "nemotron",
    "nemotron_h", "olmo", "olmo2", "olmo3", "olmo_hybrid", "olmoe", "phi3", "phimoe", "qwen2",
    "qwen2_5_vl_text", "qwen2_moe", "qwen2_vl_text", "qwen3", "qwen3_5_moe_text",
    "qwen3_5_text", "qwen3_moe", "qwen3_next", "qwen3_vl_moe_text", "qwen3_vl_text",
    "sarvam_mla", "sarvam_moe", "seed_oss", "smollm3", "solar_open", "starcoder2", "vaultgemma",
    "youtu", "zaya",
)  # fmt: skip
"""Each is tested: with the full budget its logits and tokens are those of its own attention."""

FULL = "full_attention"
SLIDING, CHUNKED = "sliding_attention", "chunked_attention"
LAYER_TYPES = (FULL, SLIDING, CHUNKED, HYBRID, *STATES, NOTHING)
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")


ROPE_IN_WINDOWS = ("afmoe", "cohere2", "cohere2_moe")
"""Layers of full attention have none."""

ROPE_IN_WINDOWS_IF_ANY = ("exaone4", "exaone_moe", "kolibri1")


@dataclass(frozen=True)
class ModelLayer:
    """One layer. `kind` and `cache_options` are what transformers' caches take, those of the layer
    that it shares keys with if it has none of its own.

    `sliding_window`: tokens that a query sees, itself included; None sees all. A *chunked* layer
    sees those of its own chunk of so many tokens. `rope_variant`: the name in
    `saap.rope.VARIANTS` of what takes RoPE off, None for a layer without RoPE. `info`: None for a
    layer without attention: it keeps a state, or nothing. `shares`: the number of the earlier
    layer whose keys and values it reads, having none of its own; None with its own.
    """

    kind: str
    cache_options: dict
    sliding_window: int | None
    rope_variant: str | None
    info: LayerInfo | None
    shares: int | None = None

    @property
    def is_full(self) -> bool:
        return self.kind in (FULL, HYBRID)

    @property
    def is_chunked(self) -> bool:
        return self.kind == CHUNKED

    @property
    def has_state(self) -> bool:
        return self.kind in (HYBRID, *STATES)


def model_layers(model: nn.Module) -> list[ModelLayer]:
    """The layers of a model. Raises ValueError that names what is not supported."""
    kinds, options = check_model(model)
    modules = attention_modules(model)
    ropes, shared = rope_variants(model, kinds), shared_layers(model.config)
    return [
        ModelLayer(kind, own, None, None, None)
        if number not in modules
        else _attention_layer(
            number, modules[number], kind, own, *ropes[number], shares=shared.get(number)
        )
        for number, (kind, own) in enumerate(zip(kinds, options, strict=True))
    ]


def _attention_layer(
    number: int, module: nn.Module, kind: str, options: dict, variant: str | None,
    inv_freq: torch.Tensor | None, shares: int | None,
) -> ModelLayer:  # fmt: skip
    info = LayerInfo(
        sm_scale=float(module.scaling),
        number=number,
        softcap=getattr(module, "attn_logit_softcapping", None),
        inv_freq=inv_freq,
        interleaved=variant in INTERLEAVED,
        device=device_of(module),
        sinks=_learned_sinks(module),
    )
    return ModelLayer(kind, options, options.get("sliding_window"), variant, info, shares)


def _learned_sinks(module: nn.Module) -> torch.Tensor | None:
    """Logits that take a part of each head's attention; None where they are offloaded weights."""
    sinks = getattr(module, "sinks", None)
    return None if sinks is None or sinks.is_meta else sinks.detach()


def check_model(model: nn.Module) -> tuple[list[str], list[dict]]:
    """The type of each layer and what its cache takes. ValueError names what is not supported."""
    attention_modules(model)
    config = model.config.get_text_config()
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model_type must be one of {', '.join(FAMILIES)}; got {config.model_type!r}"
        )
    for parameters in _rope_parameters(config):
        kind = parameters.get("rope_type", "default")
        if kind not in ROPE_TYPES:
            raise ValueError(f"rope_type must be one of {', '.join(ROPE_TYPES)}; got {kind!r}")
    both_ways = getattr(config, "use_bidirectional_attention", None)
    if both_ways not in (None, False, "vision"):  # "vision": of images, whose masks are looked at
        raise ValueError(f"attention must be causal; got use_bidirectional_attention={both_ways}")
    kinds, options = layer_kinds(config)
    for number, kind in enumerate(kinds):
        if kind not in LAYER_TYPES:
            raise ValueError(
                f"layers must be one of {', '.join(LAYER_TYPES)}; got {kind!r} for layer {number}"
            )
    return kinds, options


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes. What accelerate has offloaded comes there when it is needed."""
    for own in module.modules():
        device = getattr(getattr(own, "_hf_hook", None), "execution_device", None)
        if isinstance(device, int | str | torch.device):
            return torch.device(device)
    held = itertools.chain(module.parameters(), module.buffers())
    return next((tensor.device for tensor in held), torch.device("cpu"))


def _rope_parameters(config) -> list[dict]:
    found = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in found.values() if isinstance(value, dict)]
    return nested or [found]


def rope_variants(
    model: nn.Module, kinds: list[str]
) -> dict[int, tuple[str | None, torch.Tensor | None]]:
    """For each layer with attention, the variant that takes its RoPE off, and radians per token;
    None without.

    Variants are tried on the rotation of the model's own code, with tables from a copy of its
    rotary embedding: the original changes its frequencies when it is called. Raises ValueError if
    no variant fits.
    """
    modules = attention_modules(model)
    if not rotary_modules(model):
        return dict.fromkeys(modules, (None, None))
    device = device_of(model)
    x = torch.zeros(1, 8, 1, dtype=torch.float32, device=device)
    positions = torch.arange(8, device=device)[None]
    config = model.config.get_text_config()
    thetas = getattr(config, "layer_rope_theta", None)  # of each layer; 0: no RoPE
    found: dict[tuple, tuple] = {}
    ropes: dict[int, tuple] = {}
    for number, module in modules.items():
        ropes[number], kind = (None, None), kinds[number]
        theta = thetas[number] if thetas else None
        if latent.is_latent(module):  # of a key only a part has it; it is left on
            latent.check_maps(module)
        elif theta != 0 and has_rope(module, config.model_type, kind):
            rotary = _rotary_of(model, theta)
            by_type = "layer_type" in inspect.signature(rotary.forward).parameters
            key = (type(module), kind if by_type else None, theta)
            if key not in found:
                rotary = copy.deepcopy(rotary)
                try:
                    tables = rotary(x, positions, kind) if by_type else rotary(x, positions)
                except IndexError:
                    raise ValueError(
                        f"positions on several axes, as {config.model_type} has them, need a "
                        f"later version of transformers; got {transformers.__version__}"
                    ) from None
                if not isinstance(tables, tuple):
                    raise ValueError(
                        "RoPE must be in tables of cosines and sines to be taken off; got complex "
                        f"numbers, in layer {number} of {config.model_type}"
                    )
                variant = rope_variant(module, *tables)
                found[key] = variant, frequencies(variant, *tables)
            ropes[number] = found[key]
    return ropes


def _rotary_of(model: nn.Module, theta: float | None) -> nn.Module:
    """The model's rotary embedding; that of `theta`, if it has several."""
    rotary = rotary_modules(model)
    if theta is None:
        return rotary[0]
    return next(own for own in rotary if own.config.rope_parameters["rope_theta"] == theta)


def has_rope(module: nn.Module, family: str, kind: str) -> bool:
    if kind == CHUNKED:  # never searched, and the next one's tables are not cosines and sines
        return False
    window = getattr(module, "sliding_window", None) is not None
    if family in ROPE_IN_WINDOWS or (family in ROPE_IN_WINDOWS_IF_ANY and window):
        return kind == "sliding_attention" or getattr(module, "force_rope", False)
    return bool(getattr(module, "use_rope", True))
