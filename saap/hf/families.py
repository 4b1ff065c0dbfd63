"""Which models `attached` accepts; everything else is refused by name, before any forward."""

import copy
import inspect

import torch
from torch import nn
from transformers.cache_utils import get_layer_types_and_kwargs

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


def check_model(model: nn.Module) -> tuple[list[str], list[dict]]:
    """The type of each layer and what its cache takes. ValueError names what is not supported."""
    config = model.config.get_text_config()
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model_type={config.model_type!r} is not supported: accepted are "
            f"{', '.join(FAMILIES)}"
        )
    for parameters in _rope_parameters(config):
        kind = parameters.get("rope_type", "default")
        if kind not in ROPE_TYPES:
            raise ValueError(f"rope_type={kind!r}: accepted are {', '.join(ROPE_TYPES)}")
    if getattr(config, "use_bidirectional_attention", False):
        raise ValueError("use_bidirectional_attention=True: accepted are causal models")
    types, options = get_layer_types_and_kwargs(config)
    for number, kind in enumerate(types):
        if kind not in LAYER_TYPES:
            raise ValueError(f"layer {number} is {kind!r}: accepted are {', '.join(LAYER_TYPES)}")
    if "full_attention" not in types:
        raise ValueError(
            "all layers have a sliding window, so none has a long cache to search: accepted are "
            "models with layers of full attention"
        )
    return types, options


def _rope_parameters(config) -> list[dict]:
    found = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in found.values() if isinstance(value, dict)]
    return nested or [found]


def rope_variants(model: nn.Module, types: list[str]) -> list[str | None]:
    """For each layer the name of what takes its RoPE off; None for a layer without RoPE.

    Tried on the model file's own rotation, with tables of a copy of its rotary embedding: the
    original changes its frequencies when it is called. Raises ValueError when none fits.
    """
    modules = attention_modules(model)
    rotary = copy.deepcopy(
        next(m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding"))
    )
    weight = next(model.parameters())
    x = weight.new_zeros(1, 8, 1, dtype=torch.float32)
    positions = torch.arange(8, device=weight.device)[None]
    by_type = "layer_type" in inspect.signature(rotary.forward).parameters
    family = model.config.get_text_config().model_type
    found: dict[tuple, str] = {}
    variants: list[str | None] = []
    for module, kind in zip(modules, types, strict=True):
        if not has_rope(module, family, kind):
            variants.append(None)
            continue
        key = (type(module), kind if by_type else None)
        if key not in found:
            tables = rotary(x, positions, kind) if by_type else rotary(x, positions)
            found[key] = rope_variant(module, *tables)
        variants.append(found[key])
    return variants


def has_rope(module: nn.Module, family: str, kind: str) -> bool:
    if family == "cohere2" or (family == "exaone4" and module.sliding_window is not None):
        return kind == "sliding_attention"
    return bool(getattr(module, "use_rope", True))
