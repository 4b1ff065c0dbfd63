"""Route the attention of a model through a handler: for training an index and for evaluation.

A forward pre-hook on every attention module keeps that forward's `cos, sin`; a function registered
under the name "saap" takes RoPE off again and hands everything to the handler. The handler keeps
its own keys and values, so the model runs with `use_cache=False`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from saap.prefill import LayerCall
from saap.rope import VARIANTS

from .models import attention_modules, rope_variant

Handler = Callable[[LayerCall], Tensor]


def _saap_attention(module, query, key, value, attention_mask, *, scaling, **options):
    if options.get("s_aux") is not None:
        raise ValueError(f"{type(module).__name__}: learned attention sinks are not supported")
    handler, variant, tables = module._saap_call
    has_rope = getattr(module, "use_rope", True) and variant is not None
    if has_rope:
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
            rope=(variant, *tables) if has_rope else None,
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
