"""`attached`: a Hugging Face model decodes with Saap through its own `generate()`.

Forwards over a `SaapCache` run with the attention below, all others are untouched: the model's
own attention is set back after each. Hooks hand each layer the `cos, sin` of that very forward,
because dynamic and longrope tables change as a sequence grows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING
from transformers.masking_utils import flash_attention_mask

from saap.budget import Budget
from saap.chunks import attend_chunk
from saap.kv_store import KVStore
from saap.partition import partition_keys
from saap.rope import INTERLEAVED, VARIANTS, frequencies
from saap.routing import LayerRouting
from saap.trained_index import TrainedIndex

from .cache import SaapCache, SaapLayer
from .families import check_model, rope_variants
from .models import attention_modules, describe

NAME = "saap_cache"
SHORTEST_PARTITIONED = 1024  # tokens of a prompt; shorter ones stay dense


class SaapModel:
    """An attached model: makes caches for it. `budget` holds for the caches made from now on."""

    def __init__(
        self, model: nn.Module, index: TrainedIndex | None, budget: Budget, router: str | None
    ):
        if index is None and router not in (None, "centroid"):
            raise ValueError(f"router={router!r} without an index: accepted is 'centroid'")
        if index is not None:
            index.check_model(describe(model))
        self.model, self.index, self.budget = model, index, budget
        self.config = model.config.get_text_config()
        self.types, self.options = check_model(model)
        self.variants = rope_variants(model, self.types)
        self.routings: list[LayerRouting | None] = [None] * len(self.types)
        if index is not None:
            router = router or index.default_router
            self.routings = [
                LayerRouting.of(layer, router).to(model.device) for layer in index.layers
            ]
        wrong = [n for n in budget.dense_layers if n >= len(self.types)]
        if wrong:
            raise ValueError(
                f"dense_layers={budget.dense_layers}: accepted are 0 to {len(self.types) - 1}"
            )
        self._layers()  # a budget that does not fit the index is refused here

    def cache(self, capacity: int = 0) -> SaapCache:
        """An empty cache. `capacity`: tokens a sequence to make room for at once."""
        return SaapCache(self._layers(capacity), self)

    def save_context(
        self, cache: SaapCache, tokens: Tensor, path: str | Path, note: dict | None = None
    ) -> None:
        """Write the cache of `tokens [N]` to a file; `note` goes into its header."""
        from .contexts import save_context

        save_context(self, cache, tokens, path, note)

    def open_context(self, path: str | Path) -> tuple[SaapCache, Tensor]:
        """A cache mapped from a file that `save_context` wrote, and its tokens `[N]`."""
        from .contexts import open_context

        return open_context(self, path)

    def _layers(self, capacity: int = 0) -> list:
        layers = []
        for number, (kind, options) in enumerate(zip(self.types, self.options, strict=True)):
            if kind == "full_attention":
                dense = number in self.budget.dense_layers
                routing = None if dense else self.routings[number]
                layers.append(SaapLayer(KVStore(routing, self.budget, capacity=capacity)))
            else:
                layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**options))
        return layers

    def begin_forward(self, _, args: tuple, keywords: dict) -> None:
        """Before the decoder runs: check what it is given, put Saap's attention in place."""
        cache = keywords.get("past_key_values")
        if not isinstance(cache, SaapCache):
            return
        if cache.owner is not self:
            raise ValueError(
                "this SaapCache belongs to another model or an earlier block: make one with "
                "cache() of this block"
            )
        tokens = keywords.get("input_ids", args[0] if args else None)
        tokens = keywords.get("inputs_embeds") if tokens is None else tokens
        batch, length = tokens.shape[:2]
        mask = keywords.get("attention_mask")
        positions = keywords.get("position_ids")
        self.new_mask = cache.check_forward(batch, length, mask, positions)
        self.running, cache.in_forward = cache, True
        self.before = self.config._attn_implementation
        self.config._attn_implementation = NAME

    def end_forward(self, *_) -> None:
        """After the decoder ran, or failed."""
        if self.running is None:
            return
        self.config._attn_implementation = self.before
        self.running.end_forward()
        self.running = self.new_mask = None

    running: SaapCache | None = None
    new_mask: Tensor | None = None

    def keep_tables(self, module, _, keywords: dict) -> None:
        """Before an attention layer runs."""
        if self.running is not None:
            module._saap_step = (self, keywords.get("position_embeddings"))

    def attend(self, module, q, k, v, *, tables, sm_scale, softcap, s_aux) -> Tensor:
        """Attention of one layer, `[B, Hq, T, D]`, over the cache of the running forward."""
        number = module.layer_idx
        layer = self.running.layers[number]
        if isinstance(layer, SaapLayer):
            variant = self.variants[number]
            q_derope, k_derope = (q, k) if variant is None else _derope(variant, q, k, tables)
            if self.index is None and number not in self.budget.dense_layers:
                self._partition(layer.store, variant, k_derope, tables, sm_scale)
            layer.store.append(k, v, k_derope, self.new_mask)
            layer.slots += q.shape[2]
            out, lse = layer.store.attend(q, q_derope, sm_scale=sm_scale, softcap=softcap)
        else:
            out, lse = self._attend_sliding(layer, q, k, v, sm_scale, softcap)
        if s_aux is not None:  # gpt-oss: one more logit in the denominator, worth nothing
            out = out * torch.sigmoid(lse - s_aux.float()[:, None]).unsqueeze(-1).to(out.dtype)
        return out

    def _partition(self, store: KVStore, variant, k_derope, tables, sm_scale) -> None:
        """Cluster the keys of a prompt, if this is the first of an empty cache and long enough."""
        if store.length or k_derope.shape[2] < SHORTEST_PARTITIONED:
            return
        store.route_by(
            partition_keys(
                k_derope,
                None if variant is None else frequencies(variant, *tables),
                sm_scale=sm_scale,
                interleaved=variant in INTERLEAVED,
                mask=self.new_mask,
            )
        )

    def _attend_sliding(self, layer, q, k, v, sm_scale, softcap) -> tuple[Tensor, Tensor]:
        options = {"sm_scale": sm_scale, "softcap": softcap}
        options["sliding_window"] = layer.sliding_window
        # Padding is on the left: what is in reach of it is cut off, sequence by sequence.
        padding = [max(0, k.shape[2] - n) for n in self.running.lengths_after]
        if not any(padding):
            return attend_chunk(q, k, v, **options)
        out = torch.zeros_like(q)
        lse = torch.full(q.shape[:3], -torch.inf, device=q.device)
        for b, n in enumerate(padding):
            skipped = max(0, n - (k.shape[2] - q.shape[2]))
            if skipped < q.shape[2]:
                own = slice(b, b + 1)
                out[own, :, skipped:], lse[own, :, skipped:] = attend_chunk(
                    q[own, :, skipped:], k[own, :, n:], v[own, :, n:], **options
                )
        return out, lse


def _derope(variant: str, q: Tensor, k: Tensor, tables: tuple[Tensor, Tensor]):
    """Queries and keys at once: half as many small operations."""
    both = VARIANTS[variant](torch.cat([q, k], 1), *tables)
    return both[:, : q.shape[1]], both[:, q.shape[1] :]


def _saap_attention(module, query, key, value, attention_mask, *, scaling, **options):
    saap_model, tables = module._saap_step
    out = saap_model.attend(
        module,
        query,
        key,
        value,
        tables=tables,
        sm_scale=scaling,
        softcap=options.get("softcap"),
        s_aux=options.get("s_aux"),
    )
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, _saap_attention)
# Any registered mask will do: padding is taken from the model's own argument, once a forward.
AttentionMaskInterface.register(NAME, flash_attention_mask)


@contextmanager
def attached(
    model: nn.Module,
    index: TrainedIndex | None = None,
    budget: Budget | None = None,
    *,
    router: str | None = None,
) -> Iterator[SaapModel]:
    """While open, `model` decodes with Saap over caches that the `SaapModel` makes.

        with saap.attached(model, index, Budget(max_tokens=2048)) as saap_model:
            model.generate(**inputs, past_key_values=saap_model.cache())

    Streaming, sampling, beams, assisted and prompt-lookup decoding, left-padded batches, chunked
    prefill and the next turn over the same cache all work; prefill and any forward of several
    tokens are exact. Layers with a sliding window keep their own cache and stay dense. Without our
    cache the model computes what it always did. Without an `index` each layer clusters the keys of
    a cache's first forward, if it has 1024 tokens or more, and nothing is trained; other caches
    stay dense then. `budget`: `Budget.default()` if not given.
    `router`: one of the index's, by default the one it was trained for.

    Raises ValueError for a model that is not supported or not the index's, by name.
    """
    decoder = model.get_decoder()
    if getattr(decoder, "_saap_attached", False):
        raise ValueError("this model is attached already: leave that block first")
    saap_model = SaapModel(model, index, budget or Budget.default(), router)
    modules = attention_modules(model)
    hooks = [
        decoder.register_forward_pre_hook(saap_model.begin_forward, with_kwargs=True),
        decoder.register_forward_hook(saap_model.end_forward, always_call=True),
        *(m.register_forward_pre_hook(saap_model.keep_tables, with_kwargs=True) for m in modules),
    ]
    decoder._saap_attached = True
    try:
        yield saap_model
    finally:
        for hook in hooks:
            hook.remove()
        decoder._saap_attached = False
        for module in modules:
            if hasattr(module, "_saap_step"):
                del module._saap_step
