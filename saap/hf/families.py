"""All that is known of each layer of a model: the only place with rules about model families.

Training, evaluation and decoding ask here for windows, RoPE and learned sinks. A model that is not
supported is refused by name, before any forward.
"""

import copy
import inspect
from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import get_layer_types_and_kwargs

from saap.rope import INTERLEAVED, frequencies
from saap.selector import LayerInfo

from .models import attention_modules, rope_variant

FAMILIES = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "phi3",
    "gemma2",
    "gemma3_text",
    "smollm3",
    "gpt_oss",
    "cohere",
    "cohere2",
    "glm4",
    "granite",
    "olmo2",
    "olmo3",
    "starcoder2",
    "exaone4",
    "seed_oss",
)
"""Each is tested: with the full budget its logits and tokens are those of its own attention."""

LAYER_TYPES = ("full_attention", "sliding_attention")
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


@dataclass(frozen=True)
class ModelLayer:
    """One attention layer. `kind` and `cache_options` are what transformers' caches take.

    `sliding_window`: tokens that a query sees, itself included; None sees all. `rope_variant`: the
    name in `saap.rope.VARIANTS` of what takes RoPE off, None for a layer without RoPE.
    """

    kind: str
    cache_options: dict
    sliding_window: int | None
    rope_variant: str | None
    info: LayerInfo

    @property
    def is_full(self) -> bool:
        return self.sliding_window is None


def model_layers(model: nn.Module) -> list[ModelLayer]:
    """The layers of a model. Raises ValueError that names what is not supported."""
    kinds, options = check_model(model)
    variants, inv_freqs = rope_variants(model, kinds)
    layers = []
    for number, module in enumerate(attention_modules(model)):
        variant = variants[number]
        layers.append(
            ModelLayer(
                kinds[number],
                options[number],
                options[number].get("sliding_window"),
                variant,
                LayerInfo(
                    sm_scale=float(module.scaling),
                    number=number,
                    softcap=getattr(module, "attn_logit_softcapping", None),
                    inv_freq=inv_freqs[number],
                    interleaved=variant in INTERLEAVED,
                    device=next(module.parameters()).device,
                ),
            )
        )
    return layers


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
    if getattr(config, "use_bidirectional_attention", False):
        raise ValueError("attention must be causal; got use_bidirectional_attention=True")
    kinds, options = get_layer_types_and_kwargs(config)
    if isinstance(options, dict):  # transformers before 5.20: the same for all sliding layers
        options = [options if kind == "sliding_attention" else {} for kind in kinds]
    for number, kind in enumerate(kinds):
        if kind not in LAYER_TYPES:
            raise ValueError(
                f"layers must be {' or '.join(LAYER_TYPES)}; got {kind!r} for layer {number}"
            )
    return kinds, options


def _rope_parameters(config) -> list[dict]:
    found = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in found.values() if isinstance(value, dict)]
    return nested or [found]


def rope_variants(
    model: nn.Module, kinds: list[str]
) -> tuple[list[str | None], list[torch.Tensor | None]]:
    """For each layer, the variant that takes its RoPE off, and radians per token; None without.

    Variants are tried on the rotation of the model's own code, with tables from a copy of its
    rotary embedding: the original changes its frequencies when it is called. Raises ValueError if
    no variant fits.
    """
    rotary = copy.deepcopy(
        next(m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding"))
    )
    weight = next(model.parameters())
    x = weight.new_zeros(1, 8, 1, dtype=torch.float32)
    positions = torch.arange(8, device=weight.device)[None]
    by_type = "layer_type" in inspect.signature(rotary.forward).parameters
    family = model.config.get_text_config().model_type
    found: dict[tuple, tuple] = {}
    variants, inv_freqs = [], []
    for module, kind in zip(attention_modules(model), kinds, strict=True):
        own: tuple = (None, None)
        if has_rope(module, family, kind):
            key = (type(module), kind if by_type else None)
            if key not in found:
                tables = rotary(x, positions, kind) if by_type else rotary(x, positions)
                variant = rope_variant(module, *tables)
                found[key] = variant, frequencies(variant, *tables)
            own = found[key]
        variants.append(own[0])
        inv_freqs.append(own[1])
    return variants, inv_freqs


def has_rope(module: nn.Module, family: str, kind: str) -> bool:
    if family == "cohere2" or (family == "exaone4" and module.sliding_window is not None):
        return kind == "sliding_attention"
    return bool(getattr(module, "use_rope", True))
