"""Load models and tokenizers, and describe what an index has to fit of a model."""

import hashlib
import inspect
import sys
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import get_layer_types_and_kwargs

from saap.rope import identify_variant

from . import latent
from .gguf_header import is_gguf
from .packaged import PACKAGED, find_packaged

transformers.utils.logging.disable_progress_bar()

STATES = ("linear_attention", "conv")
"""Kinds of layers without attention: of all tokens they keep one state of a fixed size."""

HYBRID = "hybrid"
"""Layers that have attention and such a state."""

NOTHING = "dummy"
"""transformers' kind of a layer for which a cache holds nothing: a feed-forward layer alone, or
one that shares another layer's keys (`shared_layers`)."""

WITHOUT_POSITIONS = ("jamba", "kimi_linear", "nemotron_h")
"""Their other layers know the order of tokens."""


def load_model(source: str | Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32):
    """A causal language model in evaluation mode.

    `source`: a folder, a `.gguf` file, a hub name, or a name in `packaged.PACKAGED`; a folder of
    such a name is written `./NAME`. The model that is shipped for evaluation, `reference` to the
    commands, lies in `saap.eval.reference.FOLDER`.
    """
    source = resolved(source)
    if is_gguf(source):
        from .gguf import load_gguf

        model = load_gguf(source, dtype)
    elif _looks_like_path(source) and not (Path(source) / "config.json").is_file():
        raise ValueError(
            f"{source}: must be a folder with config.json, a .gguf file, a hub name, or one of "
            f"{', '.join(PACKAGED)}; got none of them"
        )
    else:
        try:
            config = transformers.AutoConfig.from_pretrained(source)
            text = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
            auto = (
                transformers.AutoModelForCausalLM
                if text
                else transformers.AutoModelForImageTextToText
            )
            model = auto.from_pretrained(source, config=config, dtype=dtype)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{source}: no model could be loaded ({first_line(error)})"
            ) from error
    attention_modules(model)
    return model.to(device).eval()


def load_tokenizer(source: str | Path):
    """The tokenizer of a model; takes what `load_model` takes."""
    source = resolved(source)
    if is_gguf(source):
        from .gguf import load_gguf_tokenizer

        tokenizer = load_gguf_tokenizer(source)
    else:
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{source}: no tokenizer could be loaded ({first_line(error)})"
            ) from error
    # Corpora are tokenised whole and cut afterwards; lengths are checked where sequences are used.
    tokenizer.model_max_length = 10**9
    return tokenizer


def resolved(source: str | Path) -> str | Path:
    """The file of a model that is named in PACKAGED; any other source as it is."""
    if source == "reference" and not Path(source).exists():  # else a hub would be asked for it
        raise ValueError(
            "source must be saap.eval.reference.FOLDER for the model that is shipped; got "
            "'reference', its name for commands alone"
        )
    return find_packaged(source) if isinstance(source, str) and source in PACKAGED else source


def _looks_like_path(source: str | Path) -> bool:
    text = str(source)
    return isinstance(source, Path) or text.startswith((".", "/", "~")) or Path(text).exists()


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def layer_kinds(config) -> tuple[list[str], list[dict]]:
    """Of each layer its kind, as transformers' caches name it, and what its cache takes; of a
    layer without keys of its own, those of the layer that it shares keys with.

    Raises ValueError where transformers is too old to tell.
    """
    config = config.get_text_config()
    kinds, options = get_layer_types_and_kwargs(config)
    if isinstance(options, dict):  # transformers before 5.20: the same for all sliding layers
        windows = "sliding_attention", "chunked_attention"
        options = [options if kind in windows else {} for kind in kinds]
    if len(kinds) < config.num_hidden_layers:
        raise ValueError(
            "layers that share keys need transformers 5.23 or later; got "
            f"{transformers.__version__}"
        )
    for number, other in shared_layers(config).items():
        kinds[number], options[number] = kinds[other], options[other]
    return kinds, options


def shared_layers(config) -> dict[int, int]:
    """Layers without keys and values of their own, and the earlier ones whose they read."""
    modes = getattr(config.get_text_config(), "kv_sharing_modes", None) or []
    kinds = getattr(config.get_text_config(), "layer_types", None)
    storing = {kinds[n]: n for n, mode in enumerate(modes) if mode == "store"}
    return {n: storing[kinds[n]] for n, mode in enumerate(modes) if mode == "reuse"}


def attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """The self-attention module of each layer that has one, by the layer's number.

    Raises ValueError for a model whose positions are in anything but RoPE.
    """
    kinds, _ = layer_kinds(model.config)
    expected = {n for n, kind in enumerate(kinds) if kind not in (*STATES, NOTHING)}
    found = {
        module.layer_idx: module
        for module in decoder_of(model).modules()
        if isinstance(number := getattr(module, "layer_idx", None), int)
        and (type(module).__name__.endswith("Attention") or latent.is_latent(module))
        and (number in expected or number >= len(kinds))
    }
    without = is_without_positions(model.config.get_text_config())
    if set(found) != expected or not (without or rotary_modules(model)):
        raise ValueError(
            "the model must be decoder-only with a rotary position embedding that saap can take "
            "off, such as llama, qwen2, qwen3, mistral, phi3; got "
            f"model_type={model.config.model_type!r}"
        )
    return dict(sorted(found.items()))


def is_without_positions(config) -> bool:
    """Whether attention knows no positions, as in some models that have other layers, too."""
    rope = getattr(config, "rope_parameters", None) or {}
    kind = getattr(config, "position_embedding_type", "rope")
    if config.model_type in WITHOUT_POSITIONS:
        return True
    return kind in (None, "nope") or rope.get("rope_theta", 0) is None


def decoder_of(model: nn.Module) -> nn.Module:
    """The part of a model that decodes: without its vision or audio part, if it has one."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model


def rotary_modules(model: nn.Module) -> list[nn.Module]:
    decoder = decoder_of(model)
    return [m for m in decoder.modules() if type(m).__name__.endswith("RotaryEmbedding")]


def max_context(model: nn.Module) -> int:
    return int(model.config.get_text_config().max_position_embeddings)


def heads_of(config, layer: int | None = None) -> tuple[int, int, int]:
    """Query heads, KV heads and dimensions of a head, of the first layer with full attention.

    `layer`: another one; in a few models, such as Gemma 4, layers differ.
    """
    config = config.get_text_config()
    if layer is None:
        kinds, _ = layer_kinds(config)
        layer = kinds.index("full_attention") if "full_attention" in kinds else 0
    joined = latent.dim_of(config)
    if joined is not None:
        return config.num_attention_heads, 1, joined
    own = config.per_layer_config[layer] if hasattr(config, "per_layer_config") else config
    heads = own.num_attention_heads
    kv_heads = getattr(own, "num_key_value_heads", None) or heads
    if config.model_type == "jetmoe":  # its keys come repeated, once for each expert
        kv_heads = heads
    return heads, kv_heads, getattr(own, "head_dim", None) or own.hidden_size // heads


def describe(model: nn.Module) -> dict:
    """What an index has to fit: shapes, RoPE settings, a fingerprint of the attention weights."""
    config = model.config.get_text_config()
    modules = attention_modules(model).values()
    heads, kv_heads, dim = heads_of(config)
    if any(p.is_meta for m in modules for p in m.parameters()):
        raise ValueError(
            "an index, or a saved context, needs the weights of all attention layers in memory, "
            "to tell models apart; got some that are offloaded: load the model whole"
        )
    norms = [
        float(
            torch.stack([p.detach().float().norm() for p in m.parameters() if p.ndim == 2]).norm()
        )
        for m in modules
    ]
    rope = getattr(config, "rope_parameters", None) or {}
    return {
        "model_type": config.model_type,
        "num_layers": config.num_hidden_layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": dim,
        "rope": {k: v for k, v in sorted(rope.items()) if isinstance(v, int | float | str)},
        "attention_norms": [round(n, 4) for n in norms],
    }


def rope_variant(module: nn.Module, cos: Tensor, sin: Tensor) -> str:
    """The name in `saap.rope.VARIANTS` that undoes this model file's own rotation."""
    own = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    if own is None:
        raise ValueError(
            f"the model file of {type(module).__name__} must have apply_rotary_pos_emb, from "
            "which "
            "saap finds out how keys are rotated; got none"
        )
    alone = "k" not in inspect.signature(own).parameters  # gemma4's takes one tensor at a time
    apply_rope = (lambda q, k, *tables: (own(q, *tables), own(k, *tables))) if alone else own
    return identify_variant(apply_rope, cos[:1, :8], sin[:1, :8], module.head_dim)


def fingerprint(tokens: Tensor) -> str:
    """A short hash of token ids, for records and metadata."""
    return hashlib.sha256(tokens.to(torch.int32).cpu().numpy().tobytes()).hexdigest()[:16]
