"""Layers of a cache made from what was saved of them, in a file or in a folder."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from saap import context_file
from saap.kv import KVStore
from saap.kv import state as kv_state

from . import unsearched
from .cache import SaapLayer

OwnStore = Callable[[int, dict, dict[str, Tensor], KVStore], KVStore]


def restore_layers(
    path: str | Path,
    saap_model,
    layers: list,
    header: dict,
    tensors: dict[str, Tensor],
    own_store: OwnStore,
) -> None:
    """Fill the new `layers` of a cache with what a context says of them.

    `own_store`: makes the store of a layer that holds rows of its own, of its number, what the
    header says of it, its tensors and the empty store that it takes the place of. Raises
    ValueError, saying `path` and the layer, for what the model's layers cannot be.
    """
    like = unsearched.after_a_token(saap_model.model, saap_model.layers)
    facts, n_tokens = header["layers"], len(tensors["token_ids"])
    if len(facts) != len(layers):
        raise ValueError(f"{path}: must have {len(layers)} layers; got {len(facts)}: altered")
    for number, (layer, state) in enumerate(zip(layers, facts, strict=True)):
        where, prefix = f"{path}: layer {number}", f"layers.{number}."
        own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        own = {n: t.to(saap_model.model.device) for n, t in own.items()}
        shares = saap_model.layers[number].shares
        searched = isinstance(layer, SaapLayer)
        kind = searched, shares is not None or unsearched.holds_nothing(layer)
        if kind != ("lengths" in state, context_file.NO_ROWS in state):
            raise ValueError(f"{where} must be of the kind that the model has; got another")
        if not searched:
            unsearched.restore(where, layer, state, own, like[number], n_tokens)
            continue
        fresh = layer.store
        try:
            if shares is None:
                layer.store = own_store(number, state, own, fresh)
            else:
                layer.store = kv_state.restored_shared(
                    state, own, fresh.selector, layers[shares].store
                )
        except ValueError as error:
            if str(error).startswith(str(path)):  # of a file in a folder
                raise
            raise ValueError(f"{where}: {error}: it was altered") from error
        layer.store.prefill = fresh.prefill
        layer.slots = layer.store.length
        layer.is_initialized = True
        unsearched.restore_state(where, layer, own, like[number])
