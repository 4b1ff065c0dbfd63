"""The one file that knows transformers: load a model, route its attention through a handler.

A forward pre-hook on every attention module keeps that forward's `cos, sin`; a function registered
under the name "saap" takes RoPE off again and hands everything to the handler. The handler keeps
its own keys and values, so the model runs with `use_cache=False`.
"""

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from .prefill import LayerCall
from .rope import VARIANTS, identify_variant

Handler = Callable[[LayerCall], Tensor]
transformers.utils.logging.disable_progress_bar()


def load_model(source: str | Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32):
    """A causal language model in evaluation mode, from a folder or a hub name."""
    if _looks_like_path(source) and not (Path(source) / "config.json").is_file():
        raise ValueError(f"{source}: accepted is a folder with config.json, or a hub name")
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}: no model could be loaded ({first_line(error)})") from error
    attention_modules(model)
    return model.to(device).eval()


def load_tokenizer(source: str | Path):
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source}: no tokenizer could be loaded ({first_line(error)})"
        ) from error
    # Corpora are tokenised whole and cut afterwards; lengths are checked where sequences are used.
    tokenizer.model_max_length = 10**9
    return tokenizer


def _looks_like_path(source: str | Path) -> bool:
    text = str(source)
    return isinstance(source, Path) or text.startswith((".", "/", "~")) or Path(text).exists()


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The self-attention modules by layer. Raises ValueError for a model without RoPE."""
    text_config = model.config.get_text_config()
    found = {
        module.layer_idx: module
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and type(module).__name__.endswith("Attention")
    }
    rotary = [m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding")]
    if not rotary or len(found) != text_config.num_hidden_layers:
        raise ValueError(
            f"model_type={model.config.model_type!r} has no rotary position embedding that saap "
            "can take off: accepted are decoder-only models with RoPE, such as llama, qwen2, "
            "qwen3, mistral, phi3"
        )
    return [found[layer] for layer in sorted(found)]


def max_context(model: nn.Module) -> int:
    return int(model.config.get_text_config().max_position_embeddings)


def describe(model: nn.Module) -> dict:
    """What an index has to fit: shapes, RoPE settings, a fingerprint of the attention weights."""
    config = model.config.get_text_config()
    modules = attention_modules(model)
    heads = config.num_attention_heads
    norms = [
        float(
            torch.stack([p.detach().float().norm() for p in m.parameters() if p.ndim == 2]).norm()
        )
        for m in modules
    ]
    rope = getattr(config, "rope_parameters", None) or {}
    return {
        "model_type": config.model_type,
        "num_layers": len(modules),
        "num_heads": heads,
        "num_kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "rope": {k: v for k, v in sorted(rope.items()) if isinstance(v, int | float | str)},
        "attention_norms": [round(n, 4) for n in norms],
    }


def rope_variant(module: nn.Module, cos: Tensor, sin: Tensor) -> str:
    """The name in `saap.rope.VARIANTS` that undoes this model file's own rotation."""
    apply_rope = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    if apply_rope is None:
        raise ValueError(
            f"{type(module).__name__}: its model file has no apply_rotary_pos_emb, so saap cannot "
            "find out how its keys are rotated"
        )
    return identify_variant(apply_rope, cos[:1, :8], sin[:1, :8], module.head_dim)


def _saap_attention(module, query, key, value, attention_mask, *, scaling, **options):
    if options.get("s_aux") is not None:
        raise ValueError(f"{type(module).__name__}: learned attention sinks are not supported")
    handler, variant, tables = module._saap_call
    if getattr(module, "use_rope", True) and variant is not None:
        derope = VARIANTS[variant]
        q_derope, k_derope = derope(query, *tables), derope(key, *tables)
    else:
        q_derope, k_derope = query, key
    out = handler(
        LayerCall(
            layer=module.layer_idx,
            q_rope=query,
            q_derope=q_derope,
            k_rope=key,
            k_derope=k_derope,
            v=value,
            sm_scale=scaling,
            softcap=options.get("softcap"),
            sliding_window=options.get("sliding_window"),
        )
    )
    return out.transpose(1, 2).contiguous(), None


def _no_mask(*_, **__) -> None:
    """Handlers are causal by construction and take one unpadded sequence a row."""


AttentionInterface.register("saap", _saap_attention)
AttentionMaskInterface.register("saap", _no_mask)


@contextmanager
def routed(model: nn.Module, handler: Handler) -> Iterator[None]:
    """While open, every attention layer of `model` computes `handler(LayerCall)`.

    The handler returns `[B, Hq, T, D]`. Call the model with `use_cache=False`, `position_ids` and
    sequences without padding. On exit the model is as it was before.
    """
    modules = attention_modules(model)
    before = model.config._attn_implementation
    variant: str | None = None

    def keep_tables(module, _, keywords):
        nonlocal variant
        tables = keywords.get("position_embeddings")
        if tables is not None and variant is None:
            variant = rope_variant(module, *tables)
        module._saap_call = (handler, variant if tables is not None else None, tables)

    hooks = [m.register_forward_pre_hook(keep_tables, with_kwargs=True) for m in modules]
    model.set_attn_implementation("saap")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()
        for module in modules:
            if hasattr(module, "_saap_call"):
                del module._saap_call


@torch.no_grad()
def run_chunks(
    model: nn.Module,
    token_ids: Tensor,
    handler: Handler,
    *,
    start: int = 0,
    chunk: int = 8192,
) -> Tensor:
    """Run `token_ids [B, T]`, at positions from `start`, through the routed model in chunks.

    Returns the logits of the last token `[B, vocab]`.
    """
    logits = None
    with routed(model, handler):
        for first in range(0, token_ids.shape[1], chunk):
            part = token_ids[:, first : first + chunk].to(model.device)
            positions = torch.arange(part.shape[1], device=model.device) + first + start
            logits = model(
                part,
                position_ids=positions[None],
                use_cache=False,
                logits_to_keep=1,
            ).logits
    return logits[:, -1]


def fingerprint(tokens: Tensor) -> str:
    """A short hash of token ids, for records and metadata."""
    return hashlib.sha256(tokens.to(torch.int32).cpu().numpy().tobytes()).hexdigest()[:16]
