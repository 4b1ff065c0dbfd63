"""Contexts on disk: a document is read once, then asked many times."""

from pathlib import Path

import torch
from torch import Tensor

from saap import context_file
from saap.budget import Budget
from saap.kv import state as kv_state
from saap.stateful import uncompiled

from . import options, unsearched
from .attach import SaapModel
from .cache import SaapCache, SaapLayer
from .folders import CacheFolder
from .models import describe
from .restoring import restore_layers


def save_context(
    saap_model: SaapModel,
    cache: SaapCache,
    tokens: Tensor,
    path: str | Path,
    note: dict | None = None,
) -> None:
    """Write a cache of one sequence, which holds `tokens [N]`, with its lists and a JSON note.

    A cache in a directory is saved there: new rows are written, then the file that counts them is
    replaced. Raises ValueError for a batch, for tokens that are not those of the cache, and when
    it cannot be written.
    """
    check_has_index(saap_model)
    cache.check_whole()
    if cache.owner is not saap_model:
        raise ValueError("this SaapCache must belong to this model and block; got one of another")
    if cache.lengths != [len(tokens)] or cache.get_seq_length() != len(tokens):
        raise ValueError(
            f"the cache must hold one sequence of the {len(tokens)} tokens given; got sequences "
            f"of {cache.lengths} tokens"
        )
    if cache.folder is not None:
        if Path(path).resolve() != cache.folder.path.resolve():
            raise ValueError(
                f"a cache in a directory must be saved there, in {cache.folder.path}; got {path}"
            )
        cache.folder.save(cache, tokens, note or {})
        return
    layers, tensors = [], {"token_ids": tokens.to(torch.int32).cpu()}
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, SaapLayer):
            state, own = kv_state.saved(layer.store)
            own |= unsearched.saved_state(layer)
        else:
            state, own = unsearched.saved(layer)
        layers.append(state)
        tensors |= {f"layers.{number}.{name}": t for name, t in own.items()}
    context_file.write(path, header_of(saap_model, cache, layers, note or {}), tensors)


def header_of(saap_model: SaapModel, cache: SaapCache, layers: list[dict], note: dict) -> dict:
    """What is saved of a context besides tensors."""
    return {
        **note,
        "last_position": cache.last_positions[0],
        "model": describe(saap_model.model),
        "index": index_id(saap_model),
        "budget": layout(saap_model, cache.budget),
        "layers": layers,
    }


def check_made_with(saap_model: SaapModel, path: str | Path, header: dict) -> None:
    """ValueError, naming what differs, for a context of another model, index or layout."""
    for name, own in (
        ("model", describe(saap_model.model)),
        ("index", index_id(saap_model)),
        ("budget", layout(saap_model, saap_model.budget)),
    ):
        theirs = header.get(name)
        if theirs != own:
            both = {**own, **theirs} if isinstance(theirs, dict) and isinstance(own, dict) else {}
            keys = [k for k in both if theirs.get(k) != own.get(k)]
            detail = (
                f" ({keys[0]} is {theirs.get(keys[0])}, not {own.get(keys[0])})" if keys else ""
            )
            raise ValueError(
                f"{path}: this context must be made with this {name}; got one made with another "
                f"{name}{detail}: make it again with `saap prefill`"
            )


@uncompiled
def open_context(
    saap_model: SaapModel, path: str | Path, fast_memory: int | None = None
) -> tuple[SaapCache, Tensor]:
    """The saved cache, memory-mapped from a file or over the files of a folder; its tokens `[N]`.

    `fast_memory`: as for `SaapModel.cache`, if `path` is a folder. Raises ValueError, naming what
    differs, for a context of another model, index or layout, for files that are cut short or
    altered, and for a folder that is in use.
    """
    check_has_index(saap_model)
    if Path(path).is_dir():
        return _open_folder(saap_model, path, fast_memory)
    if fast_memory is not None:
        raise ValueError(f"{path}: fast_memory needs a context in a directory; got a file")
    header, tensors = context_file.read(path)
    check_made_with(saap_model, path, header)
    cache = saap_model.cache()

    def store_of(number, state, own, fresh):
        if (context_file.ONE_VECTOR in state) != kv_state.holds_one_vector(fresh):
            raise ValueError("values must be held as the model has them; got otherwise")
        store = kv_state.restored(
            state, own, fresh.selector, saap_model.budget, saap_model.kv_dtype
        )
        expected = saap_model.kv_dtype or saap_model.model.dtype
        if store.k.dtype != expected:
            raise ValueError(f"k must be {expected}; got {store.k.dtype}")
        return store

    restore_layers(path, saap_model, cache.layers, header, tensors, store_of)
    tokens = tensors["token_ids"].long()
    if cache.lengths != [len(tokens)]:
        raise ValueError(
            f"{path}: must hold a row per token; got {len(tokens)} tokens for {cache.lengths} rows"
        )
    cache.begin_at(last_position(path, header, len(tokens)), len(tokens))
    return cache, tokens


def _open_folder(
    saap_model: SaapModel, path: str | Path, fast_memory: int | None
) -> tuple[SaapCache, Tensor]:
    """The cache of a folder as it was last saved, and its tokens `[N]`."""
    folder = CacheFolder(saap_model, path, fast_memory, new=False)
    path = folder.path  # as its files are told of
    try:
        header, tensors = folder.folder.read()
        check_made_with(saap_model, path, header)
        model = header["model"]
        layers = saap_model.cache_layers()

        def store_of(number, state, own, fresh):
            rows = folder.opened_rows(number, model["num_kv_heads"], model["head_dim"])
            store = kv_state.restored_in_file(
                state, own, fresh.selector, saap_model.budget, rows, saap_model.kv_dtype
            )
            folder.digests[number] = own["digests"]
            return store

        restore_layers(path, saap_model, layers, header, tensors, store_of)
    except BaseException as error:
        folder.close()
        if isinstance(error, ValueError) and not str(error).startswith(str(path)):
            raise ValueError(f"{path}: {error}: it was altered") from error
        raise
    folder.tokens = tensors["token_ids"]
    cache = SaapCache(layers, saap_model, folder)
    n_tokens = len(folder.tokens)
    cache.begin_at(last_position(path, header, n_tokens), n_tokens)
    return cache, folder.tokens.long()


def last_position(path: str | Path, header: dict, n_tokens: int) -> int:
    """That of the last token: with images in a text it may be a lower one than their number."""
    found = header.get("last_position", n_tokens - 1)
    if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found < 2**31:
        raise ValueError(f"{path}: last_position must be in 0..2**31 - 1; got {found!r}: altered")
    return found


def layout(saap_model: SaapModel, budget: Budget) -> dict:
    """The parts of a budget that decide where rows lie: the same when a context is opened."""
    fixed = {name: getattr(budget, name) for name in kv_state.LAYOUT}
    if saap_model.kv_dtype not in (None, saap_model.model.dtype):
        fixed["kv_dtype"] = str(saap_model.kv_dtype).removeprefix("torch.")
    return {
        **fixed,
        "dense_layers": list(budget.dense_layers),
        "method": saap_model.method.name,
    }


def check_has_index(saap_model: SaapModel) -> None:
    if saap_model.group is not None:
        raise ValueError(
            "a context must be whole in one process to be saved or opened; got a group"
        )
    options.check_can_be_saved(saap_model.model, saap_model.layers)
    if saap_model.index is None and not saap_model.method.saves_itself:
        raise ValueError(
            f"a context of method {saap_model.method.name!r} needs a trained index, since lists "
            "mean nothing without their partition; got none"
        )


def index_id(saap_model: SaapModel) -> str:
    return "none" if saap_model.index is None else saap_model.index.fingerprint
