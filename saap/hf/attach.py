"""`attached`: a Hugging Face model decodes with Saap through its own `generate()`."""

import threading
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING

from saap.budget import Budget
from saap.distributed import Group, SplitStore
from saap.index.moments import MOST_OBSERVED
from saap.kv import KVStore
from saap.kv.shared import SharedStore
from saap.methods import Method, find_method
from saap.prefill import PrefillBudget
from saap.trained_index import TrainedIndex

from . import agreement, latent, lossless, options
from .attention import check_installed, handled, installed
from .cache import SaapCache, SaapLayer
from .cache_argument import given
from .families import model_layers
from .folders import CacheFolder
from .hybrid import HybridLayer
from .in_place import put_in_place
from .models import NOTHING, describe
from .pace import Verify

_attached: "weakref.WeakKeyDictionary[nn.Module, SaapModel]" = weakref.WeakKeyDictionary()
_lock = threading.Lock()


class SaapModel:
    """A model while it is attached; makes its caches."""

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        budget: Budget,
        verify: Verify | None = None,
        group: Group | None = None,
        kv_dtype: torch.dtype | None = None,
        prefill: PrefillBudget | None = None,
    ):
        if verify is not None:
            lossless.check_tables(model)
        if method.index is not None:
            method.index.check_model(describe(model))
        self.model, self.method, self.verify = model, method, verify
        self.group, self.kv_dtype, self.prefill = group, kv_dtype, prefill
        self.layers = model_layers(model)
        self.windows = {
            layer.kind: layer.sliding_window
            for layer in self.layers
            if layer.sliding_window is not None
        }
        """How many tokens layers see that do not see all, by their kind."""
        options.check_states(self.layers, verify)
        options.check_shared(self.layers, group)
        options.check_latents(model, group)
        options.check_prefill(model, prefill, verify, group)
        options.check_kv_dtype(model, kv_dtype)
        self.budget = budget

    @property
    def budget(self) -> Budget:
        """What a step visits. It may be set, for later caches; ValueError for one that does not
        fit the model or the method, and in a group where ranks set others: all have to set it."""
        return self._budget

    @budget.setter
    def budget(self, budget: Budget) -> None:
        options.check_layers_of(budget, len(self.layers))
        before, self._budget = getattr(self, "_budget", budget), budget
        try:
            if self.group is not None:
                agreement.check(self)
            self.cache_layers()  # a budget that does not fit the method is refused here
        except ValueError:
            self._budget = before
            raise

    @property
    def index(self) -> TrainedIndex | None:
        return self.method.index

    def cache(
        self,
        capacity: int = 0,
        parts: Sequence[int] | None = None,
        *,
        directory: str | Path | None = None,
        fast_memory: int | None = None,
    ) -> SaapCache:
        """An empty cache. `capacity`: tokens per sequence to make room for at once.

        `parts`, for a group: how many tokens each rank but the last holds. If not given, the
        ranks share the tokens of the first forward evenly.

        `directory`: a new or empty folder; keys and values lie in files there. Works for one
        sequence, with methods `saap` and `dense`, on the CPU. `fast_memory`: bytes for the rows
        that the latest steps visited, all layers together; with None rows are read from the
        memory-mapped files (docs/scale.md).
        """
        if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 0:
            raise ValueError(f"capacity must be a number of tokens, 0 or more; got {capacity!r}")
        if parts is not None and self.group is None:
            raise ValueError("parts must be None without a group; got parts")
        if directory is None:
            if fast_memory is not None:
                raise ValueError("fast_memory must be None without a directory; got some")
            return SaapCache(self.cache_layers(capacity, parts), self)
        folder = CacheFolder(self, directory, fast_memory, new=True)
        return SaapCache(self.cache_layers(capacity, folder=folder), self, folder)

    def save_context(
        self, cache: SaapCache, tokens: Tensor, path: str | Path, note: dict | None = None
    ) -> None:
        """Write the cache of `tokens [N]` to the file `path`.

        A cache in a directory is saved there, and only what is new is written. `note`: values of
        your own for the header.
        """
        from .contexts import save_context

        save_context(self, cache, tokens, path, note)

    def open_context(
        self, path: str | Path, *, fast_memory: int | None = None
    ) -> tuple[SaapCache, Tensor]:
        """The cache that `save_context` last wrote to a file or a directory, and its tokens `[N]`.

        `fast_memory`: as for `cache`, if `path` is a directory.
        """
        from .contexts import open_context

        return open_context(self, path, fast_memory)

    def cache_layers(
        self,
        capacity: int = 0,
        parts: Sequence[int] | None = None,
        folder: CacheFolder | None = None,
    ) -> list:
        """New layers for a cache, with their rows in `folder` or in memory."""
        layers: list = []
        for number, layer in enumerate(self.layers):
            if layer.is_full:
                owner = None if layer.shares is None else layers[layer.shares].store
                store = self._store(number, owner, capacity, parts, folder)
                if layer.has_state:
                    layers.append(HybridLayer(store, **layer.cache_options))
                else:
                    layers.append(SaapLayer(store))
            else:
                kind = layer.kind if layer.shares is None else NOTHING
                layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**layer.cache_options))
        return layers

    def _store(
        self,
        number: int,
        owner: KVStore | None,
        capacity: int,
        parts: Sequence[int] | None,
        folder: CacheFolder | None,
    ) -> KVStore | SplitStore:
        """The store of a searched layer. `owner`: of the layer whose keys and values it shares."""
        dense = number in self.budget.dense_layers
        dense |= self.group is not None and self.method.is_exact  # ranks choose nothing together
        selector = None if dense else self.method.selector(self.layers[number].info)
        prefill = None if dense else self.prefill
        if owner is not None:
            return SharedStore(selector, self.budget, owner, prefill=prefill)
        if self.group is not None:
            return SplitStore(selector, self.budget, self.group, parts, kv_dtype=self.kv_dtype)
        rows = latent.rows_of(self.model) if folder is None else folder.new_rows(number)
        return KVStore(
            selector, self.budget, capacity=capacity, kv_dtype=self.kv_dtype, prefill=prefill,
            rows=rows,
        )  # fmt: skip

    @contextmanager
    def forward_over(self, cache: SaapCache, arguments: tuple, keywords: dict) -> Iterator[None]:
        """One forward of the decoder over `cache`: checked first, then handled by its layers."""
        if cache.owner is not self:
            raise ValueError(
                "this SaapCache must belong to this model and block; got one of another: make one "
                "with cache() of this block"
            )
        check_installed(self.model)
        config = self.model.config.get_text_config()
        if keywords.get("output_attentions", config.output_attentions):
            raise ValueError(
                "output_attentions must be False over a SaapCache, whose kernels keep no weights; "
                "got True"
            )
        tokens = keywords.get("input_ids", arguments[0] if arguments else None)
        tokens = keywords.get("inputs_embeds") if tokens is None else tokens
        if self.group is not None:
            agreement.check_tokens(self.group, tokens)
        forward = cache.begin_forward(
            *tokens.shape[:2], keywords.get("attention_mask"), keywords.get("position_ids")
        )
        broken = True
        try:
            with handled(self.model, forward, self.layers):
                yield
            broken = False
        finally:
            cache.end_forward(broken)

    def __repr__(self) -> str:
        return f"SaapModel({self.method.name!r}, {self.budget})"


@torch.compiler.disable(recursive=False)
def _forward(decoder, *arguments, **keywords):
    """Stands in for the forward of an attached model's decoder.

    If the model is compiled, a forward over our cache still runs uncompiled, because what it does
    depends on the cache, which grows at each step. Other forwards run compiled.

    A copy of the decoder has this function, too, but is not attached: it computes what its class
    does.
    """
    saap_model = _attached.get(decoder)
    if saap_model is None:
        return type(decoder).forward(decoder, *arguments, **keywords)
    cache = given(keywords)
    if not isinstance(cache, SaapCache):
        return saap_model.own_forward(*arguments, **keywords)
    return _forward_over(saap_model, cache, arguments, keywords)


@torch.compiler.disable
def _forward_over(saap_model: SaapModel, cache: SaapCache, arguments: tuple, keywords: dict):
    with saap_model.forward_over(cache, arguments, keywords):
        if not any(layer.shares is not None for layer in saap_model.layers):
            return saap_model.own_forward(*arguments, **keywords)
        return last_tokens(saap_model.own_forward, *arguments, **keywords)


def last_tokens(forward: Callable, *arguments, logits_to_keep: int | Tensor = 0, **keywords):
    """A forward of a decoder that computes its layers without keys of their own for no more tokens
    than logits are asked for: here for as many as selectors of these layers learn from."""
    if not isinstance(logits_to_keep, int) or not logits_to_keep:
        return forward(*arguments, logits_to_keep=logits_to_keep, **keywords)
    found = forward(*arguments, logits_to_keep=max(logits_to_keep, MOST_OBSERVED), **keywords)
    if isinstance(found, tuple):
        return found[0][:, -logits_to_keep:], *found[1:]
    found.last_hidden_state = found.last_hidden_state[:, -logits_to_keep:]
    return found


def _generate(model, *arguments, **keywords):
    """Stands in for `generate()` of a model that is attached with `verify`."""
    saap_model = _attached.get(model.get_decoder())
    if saap_model is None:
        return type(model).generate(model, *arguments, **keywords)
    if saap_model.verify is None:  # a copy of a model that had `verify` brought this along
        return saap_model.own_generate(*arguments, **keywords)
    return lossless.generate(model, saap_model.own_generate, *arguments, **keywords)


# A method is pickled as the attribute of this name: a model from a pickle has its class's own.
_forward.__name__, _generate.__name__ = "forward", "generate"


def _own(owner: nn.Module, name: str, function: Callable) -> Callable | None:
    """The method of `owner` that `function` replaces; None if it has none."""
    before = vars(owner).get(name)  # accelerate puts one of its own there
    if before is None or getattr(before, "__func__", None) is function:
        own = getattr(type(owner), name, None)
        return None if own is None else types.MethodType(own, owner)
    return before


@contextmanager
def attached(
    model: nn.Module,
    index: TrainedIndex | None = None,
    budget: Budget | None = None,
    *,
    method: str | Method = "saap",
    verify: int | Verify | None = None,
    group: Group | None = None,
    kv_dtype: torch.dtype | None = None,
    prefill: PrefillBudget | None = None,
) -> Iterator[SaapModel]:
    """While open, `model` decodes with Saap over caches that the `SaapModel` makes.

        with saap.attached(model, index, Budget(max_tokens=2048)) as saap_model:
            model.generate(**inputs, cache=saap_model.cache())

    Streaming, sampling, beams, assisted and prompt-lookup decoding, left-padded batches, chunked
    prefill and the next turn over the same cache all work. Prefill and any forward of several
    tokens are exact. Layers with a sliding window keep their own cache and stay dense. Without our
    cache the model computes what it always did. Other threads may use the model at the same time,
    with caches of their own or without.

    `method`: a name in `saap.METHODS`, or a `Method` object, which brings its own index. "saap"
    needs no `index`: each layer learns two covariance matrices from the prompt's own queries and
    keys at the first decode step, and again whenever the context has grown by half. Prompts with
    fewer than 512 tokens between sinks and window stay dense until they have grown.
    `budget`: what a step may visit; `Budget.default()` if not given.
    `verify`: `generate()` gives the tokens of the dense model; at most this many tokens are
    drafted over the budget and then verified in one exact forward (docs/lossless.md).
    `group`: the context is split over its ranks, which all run this with the same model, budget
    and text (`saap.distributed`, docs/scale.md).
    `kv_dtype`: dtype in which the cache holds keys and values, such as `torch.int8`; None for the
    model's own (docs/scale.md).
    `prefill`: tokens of a long prompt visit only a part of the tokens before them, chosen block by
    block; None, the default, reads prompts exactly. CPU only (docs/scale.md).

    Raises GroupError if ranks differ. Raises ValueError for a model that is not supported or not
    the one that the index was trained for, for an unknown method, for a method that needs an index
    and got none, and for a budget that the method cannot follow.
    """
    options.check_kinds(index, budget)
    if isinstance(method, str):
        method = find_method(method)(index)
    elif index is not None and method.index is not index:
        raise ValueError(
            "index must be None beside a Method object, which brings its own; got another one"
        )
    if verify is not None and not isinstance(verify, Verify):
        verify = Verify(verify)
    decoder = model.get_decoder()
    saap_model = SaapModel(
        model, method, budget or Budget.default(), verify, group, kv_dtype, prefill
    )
    saap_model.own_forward = _own(decoder, "forward", _forward)
    saap_model.own_generate = _own(model, "generate", _generate)
    if verify is not None and saap_model.own_generate is None:
        raise ValueError(
            f"verify needs a model with generate(); got {type(model).__name__}, which has none"
        )
    with _lock:
        if decoder in _attached:
            raise ValueError(
                "a model must be attached once at a time; got a second block: leave the first one"
            )
        _attached[decoder] = saap_model
    try:
        with ExitStack() as opened:
            opened.enter_context(installed(model))
            opened.enter_context(put_in_place(decoder, "forward", _forward))
            if verify is not None:
                opened.enter_context(put_in_place(model, "generate", _generate))
            yield saap_model
    finally:
        del _attached[decoder]
