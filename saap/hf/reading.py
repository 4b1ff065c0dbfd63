"""Read a context densely once, and make caches of it for any method without reading it again."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import DynamicCache

from saap.budget import Budget
from saap.index.moments import MOST_OBSERVED
from saap.index.rows import BucketRows
from saap.prefill import PrefillBudget

from . import latent, unsearched
from .attach import SaapModel, attached
from .attention import LayerCall
from .cache import SaapCache, SaapLayer
from .cache_argument import over
from .hybrid import copy_state

DENSE = Budget(max_tokens=0)


@dataclass
class ReadContext:
    """The tokens of one sequence as every layer saw them, in time order.

    `cache`: the dense cache. `k_derope[layer] [1, Hkv, N, D]`: keys with RoPE taken off.
    `queries[layer]`: `q_rope, q_derope [n, Hq, D]` of the last n tokens, for layers with full
    attention. `latest[layer] [1, Hq, n, D]`: queries of the last tokens, for selectors that learn
    from a prompt's queries.
    """

    cache: SaapCache
    k_derope: dict[int, Tensor] = field(default_factory=dict)
    queries: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    latest: dict[int, Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return self.cache.lengths[0]

    def keys(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """`k_rope, v, k_derope [1, Hkv, N, D]` of a layer with full attention."""
        store, n = self.cache.layers[layer].store, self.length
        return store.k[:, :, :n], store.v[:, :, :n], self.k_derope[layer]

    def new_rows(self, layer: int) -> BucketRows:
        """For a store of this layer, which holds vectors once if the cache does."""
        return BucketRows(same=self.cache.layers[layer].store.rows.same)


@torch.no_grad()
def read_context(
    model: nn.Module,
    tokens: Int[Tensor, " N"],
    *,
    n_queries: int = 0,
    chunk: int = 4096,
    prefill: PrefillBudget | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ReadContext:
    """Prefill `tokens` in chunks, and keep the last `n_queries` queries of each layer.

    Exactly, or within a `prefill` budget, with the sinks and the window of `Budget`'s defaults.
    """
    if not 0 <= n_queries <= len(tokens):
        raise ValueError(f"n_queries must be in 0..{len(tokens)}; got {n_queries}")
    keys: dict[int, list[Tensor]] = {}
    asked: dict[int, list[tuple[Tensor, Tensor]]] = {}
    latest: dict[int, Tensor] = {}
    chunk = max(chunk, n_queries)

    def keep(call: LayerCall) -> None:
        if call.sliding_window is not None:
            return
        keys.setdefault(call.layer, []).append(call.k_derope)
        before = [latest[call.layer]] if call.layer in latest else []
        latest[call.layer] = torch.cat([*before, call.q_rope], 2)[:, :, -MOST_OBSERVED:]
        if n_queries:
            both = tuple(
                q[0, :, -n_queries:].transpose(0, 1) for q in (call.q_rope, call.q_derope)
            )
            # The last two chunks hold all that is wanted.
            asked[call.layer] = [*asked.get(call.layer, [])[-1:], both]

    with attached(model, method="dense", budget=DENSE, prefill=prefill) as saap_model:
        cache = saap_model.cache(len(tokens))
        cache.observer = keep
        decoder = model.get_decoder()
        for start in range(0, len(tokens), chunk):
            part = tokens[None, start : start + chunk].to(model.device)
            decoder(part, **over(cache))
            progress(min(start + chunk, len(tokens)), len(tokens))
    return ReadContext(
        cache,
        {layer: torch.cat(parts, 2) for layer, parts in keys.items()},
        {
            layer: tuple(torch.cat(q)[-n_queries:].contiguous() for q in zip(*parts, strict=True))
            for layer, parts in asked.items()
        },
        latest,
    )


def cache_from(saap_model: SaapModel, context: ReadContext, capacity: int = 0) -> SaapCache:
    """A cache of this model with the tokens of `context`, as if it had read them itself.

    `capacity`: tokens to make room for.
    """
    cache = saap_model.cache(max(capacity, context.length))
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, SaapLayer):
            layer.store.append(*context.keys(number))
            if layer.store.selector is not None:
                queries = context.latest[number]
                layer.store.selector.observe(queries, [queries.shape[2]])
            layer.slots = context.length
            layer.is_initialized = True
    rewind(cache, context)
    return cache


def dynamic_cache_from(model: nn.Module, context: ReadContext) -> DynamicCache:
    """transformers' own cache with the tokens of `context`: to compare with."""
    config = model.config.get_text_config()
    cache = DynamicCache(config=config)
    for number, layer in enumerate(context.cache.layers):
        if unsearched.holds_nothing(cache.layers[number]):
            continue
        if isinstance(layer, SaapLayer):
            k, v, _ = context.keys(number)
            if latent.dim_of(config) is not None:
                k, v = latent.parted(config, k)
            cache.update(k.clone(), v.clone(), number)
            if unsearched.keeps_state(layer):
                copy_state(layer, cache.layers[number])
        else:
            cache.layers[number] = copy.deepcopy(layer)
    return cache


def rewind(cache: SaapCache, context: ReadContext) -> None:
    """Forget all tokens of `cache` that came after those of `context`, which it was made from."""
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, SaapLayer):
            layer.store.truncate(layer.store.length - context.length)
            layer.slots = context.length
            if unsearched.keeps_state(layer):
                copy_state(context.cache.layers[number], layer)
        else:  # a window that has moved on cannot be moved back
            cache.layers[number] = copy.deepcopy(context.cache.layers[number])
    cache.begin_at(context.length - 1, context.length)
    cache.torn = False  # what a broken-off forward had moved on is back
