"""The one attention function that is registered with transformers, and who answers its calls.

While a model is *installed* its attention layers call `_attention`, which looks for a *handler* of
that model in the running thread. Without a handler the layer computes what it always did. With
one, RoPE is taken off and the handler answers the call: a cache that decodes, or code that trains
or measures. Handlers are kept per thread and reset in `finally`, so an interrupt leaves nothing
behind.
"""

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from saap.rope import VARIANTS
from saap.stateful import uncompiled

from . import latent
from .families import ModelLayer, model_layers
from .in_place import put_in_place
from .models import attention_modules

PREFIX = "saap_over_"


@dataclass(frozen=True)
class LayerCall:
    """What one attention layer was called with: T new tokens.

    `q_rope, q_derope [B, Hq, T, D]`, `k_rope, k_derope, v [B, Hkv, T, D]`: keys and queries as
    the attention sees them (after RoPE and any norm), and the same with RoPE taken off, which is
    done when they are first asked for. `rope`: the variant in `saap.rope.VARIANTS` and the tables
    `cos, sin [B, T, r]`, None without RoPE. A layer with a sliding window is never searched: its
    RoPE is left on, and where the model keeps a cache, `k_rope, v` are not the new tokens alone
    but all that the window reaches. If it is `chunked`, its window begins anew at every multiple
    of `sliding_window`. A layer that shares another one's keys gets keys of T tokens, but queries
    and `cos, sin` of the last of them only, or of all. A layer that keeps latents has them as
    keys and values of one KV head, and queries that fit (`latent.py`). `sinks [Hq]`: learned
    logits that take part in the softmax without a value, or None.
    """

    layer: int
    q_rope: Tensor
    k_rope: Tensor
    v: Tensor
    sm_scale: float
    softcap: float | None = None
    sliding_window: int | None = None
    chunked: bool = False
    rope: tuple[str, Tensor, Tensor] | None = None
    sinks: Tensor | None = None

    @functools.cached_property
    def _derope(self) -> tuple[Tensor, Tensor]:
        """Take RoPE off queries and keys together: half as many small operations."""
        if self.rope is None:
            return self.q_rope, self.k_rope
        variant, *tables = self.rope
        if self.q_rope.shape[2] != self.k_rope.shape[2]:
            return VARIANTS[variant](self.q_rope, *tables), self.k_rope[:, :, :0]
        both = VARIANTS[variant](torch.cat([self.q_rope, self.k_rope], 1), *tables)
        return both[:, : self.q_rope.shape[1]], both[:, self.q_rope.shape[1] :]

    @property
    def q_derope(self) -> Tensor:
        return self._derope[0]

    @property
    def k_derope(self) -> Tensor:
        return self._derope[1]


Handler = Callable[[LayerCall], tuple[Tensor, Tensor]]
"""Computes `out [B, Hq, T, D]` and `lse [B, Hq, T]` of a call, learned sinks left out of both."""


@dataclass
class _Running:
    """The handler of one thread, and the RoPE tables of the running forward."""

    handler: Handler
    layers: list[ModelLayer]
    tables: dict[int, tuple[Tensor, Tensor]]


class _Threads(threading.local):
    def __init__(self):
        self.running: dict[int, _Running] = {}  # by id of the model's text configuration


_threads = _Threads()

_users: dict[int, tuple[int, str]] = {}
"""By id of a configuration: how many blocks use it, and the implementation before the first."""

_lock = threading.Lock()


@contextmanager
def handled(model: nn.Module, handler: Handler, layers: list[ModelLayer]) -> Iterator[None]:
    """While open, the handler computes the attention of the installed `model` in this thread."""
    key = id(model.config.get_text_config())
    before = _threads.running.get(key)
    _threads.running[key] = _Running(handler, layers, {})
    try:
        yield
    finally:
        if before is None:
            del _threads.running[key]
        else:
            _threads.running[key] = before


@contextmanager
def installed(model: nn.Module) -> Iterator[None]:
    """While open, the attention of `model` can be handled; without a handler nothing changes."""
    modules = attention_modules(model).values()
    with ExitStack() as opened:
        for module in modules:
            hook = module.register_forward_pre_hook(_keep_tables, with_kwargs=True)
            opened.callback(hook.remove)
            own = getattr(vars(module).get("expand_kv"), "__func__", None)
            if latent.is_latent(module) and own is not _expand_kv:  # else an outer block's
                opened.enter_context(put_in_place(module, "expand_kv", _expand_kv))
        opened.enter_context(_chosen(model.config.get_text_config()))
        yield


@contextmanager
def _chosen(config) -> Iterator[None]:
    """While open, models of this configuration call our attention. Several may have one
    configuration, and blocks be left in any order: the last one puts back what was there."""
    with _lock:
        users, before = _users.get(id(config), (0, config._attn_implementation))
        _users[id(config)] = users + 1, before
        if not before.startswith(PREFIX):
            config._attn_implementation = _registered(before)
    try:
        yield
    finally:
        with _lock:
            users, before = _users.pop(id(config))
            if users > 1:
                _users[id(config)] = users - 1, before
            else:
                config._attn_implementation = before


def check_installed(model: nn.Module) -> None:
    """ValueError if another attention implementation was chosen since `installed`."""
    name = model.config.get_text_config()._attn_implementation
    if not name.startswith(PREFIX):
        raise ValueError(
            "the attention implementation must not be changed while a model is attached; got "
            f"{name!r}"
        )


@contextmanager
def routed(
    model: nn.Module, handler: Handler, layers: list[ModelLayer] | None = None
) -> Iterator[None]:
    """While open, every attention layer of `model` computes `handler(LayerCall)`.

    Call the model with `use_cache=False`, `position_ids` and sequences without padding: handlers
    are causal by construction. On exit the model is as it was before.
    """
    layers = model_layers(model) if layers is None else layers
    with installed(model), handled(model, handler, layers):
        yield


def _registered(original: str) -> str:
    """The name of Saap's attention over a model whose own implementation is `original`."""
    name = PREFIX + original
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, functools.partial(_attention, original))
        AttentionMaskInterface.register(name, functools.partial(_mask, original))
    return name


@uncompiled
def _keep_tables(module, _, keywords: dict) -> None:
    """Keep the `cos, sin` of this very forward, before an attention layer runs.

    They must not be computed again: dynamic and longrope tables change as a sequence grows.
    """
    running = _threads.running.get(id(module.config))
    if running is not None:
        running.tables[module.layer_idx] = keywords.get("position_embeddings")


@uncompiled
def _expand_kv(module, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
    """Latents stay as they are where a handler attends to them."""
    if id(module.config) in _threads.running:
        return latent.joined(kv_nope, k_rot)
    return type(module).expand_kv(module, kv_nope, k_rot)


_expand_kv.__name__ = "expand_kv"  # by which a method is pickled


@uncompiled
def _mask(original: str, *arguments, config=None, **options):
    """No mask: padding is taken from the model's own argument, once per forward."""
    if config is not None and id(config) in _threads.running:
        return None
    make = ALL_MASK_ATTENTION_FUNCTIONS[original]
    return make(*arguments, config=config, **options)


@uncompiled
def _attention(
    original: str, module, query, key, value, attention_mask=None, *, scaling=None, **options
):
    running = _threads.running.get(id(module.config))
    if running is None:
        own = ALL_ATTENTION_FUNCTIONS.get_interface(original, _eager_of(module))
        return own(module, query, key, value, attention_mask, scaling=scaling, **options)
    layer = running.layers[module.layer_idx]
    tables = running.tables.pop(module.layer_idx, None)
    searched = layer.rope_variant is not None and layer.is_full
    rope = (layer.rope_variant, *tables) if searched else None
    sinks = options.get("s_aux")
    if latent.is_latent(module):
        query = latent.absorbed(module, query)
    out, lse = running.handler(
        LayerCall(
            layer=module.layer_idx,
            q_rope=query.to(key.dtype),
            k_rope=key,
            v=value.to(key.dtype),  # under autocast RoPE leaves keys in 32 bits, and them in 16
            sm_scale=scaling,
            softcap=options.get("softcap"),
            sliding_window=layer.sliding_window,
            chunked=layer.is_chunked,
            rope=rope,
            sinks=sinks,
        )
    )
    if sinks is not None:  # gpt-oss: one more logit in the denominator, worth nothing
        share = torch.sigmoid(lse - sinks.float()[:, None])
        out = out * share.unsqueeze(-1).to(out.dtype)
    if latent.is_latent(module):
        out = latent.values_of(module, out)
    return out.transpose(1, 2).contiguous(), None


def _eager_of(module: nn.Module) -> Callable:
    return sys.modules[type(module).__module__].eager_attention_forward


# A model that was pickled while attached keeps the name, and imports this module when it is read.
for _name in ("eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()):
    _registered(_name)
