"""What of a KV store is saved, and a store from it."""

import torch
from torch import Tensor

from .budget import Budget
from .kv_store import KVStore
from .routing import LayerRouting

SPARE_ROWS = 1024
LAYOUT = ("n_sink", "window", "flush_every")


def saved(store: KVStore) -> tuple[dict, dict[str, Tensor]]:
    """Lengths, and views of the rows with some spare ones: an opened store is written in place."""
    store.settle()
    n = store.length
    store.reserve(n + SPARE_ROWS)
    rows = store.rows
    tensors = {}
    for name in ("k", "v", "lists", "tokens"):
        tensors[name] = getattr(rows, name)[:, :, : n + SPARE_ROWS]
        for b, length in enumerate(store.lengths):
            tensors[name][b, :, length:] = 0  # whatever was in that memory is nobody's business
    return {"lengths": store.lengths, "middles": store.middles}, tensors


def restored(
    header: dict, tensors: dict[str, Tensor], routing: LayerRouting | None, budget: Budget
) -> KVStore:
    """A store over these tensors, which may be mapped. Raises ValueError for lists out of range.

    The budget has to lay out rows as the one did that the store was made with.
    """
    store = KVStore(routing, budget)
    rows = store.rows
    rows.k, rows.v = tensors["k"], tensors["v"]
    rows.lists, rows.tokens = tensors["lists"], tensors["tokens"]
    store.lengths, store.middles = list(header["lengths"]), list(header["middles"])
    for b, (length, middle) in enumerate(zip(store.lengths, store.middles, strict=True)):
        own = rows.lists[b, :, budget.n_sink : budget.n_sink + middle]
        nlist = 0 if routing is None else routing.centroids.shape[1]
        wrong = middle and (int(own.min()) < 0 or int(own.max()) >= nlist)
        if wrong or not 0 <= middle <= length <= rows.capacity:
            raise ValueError(
                f"{middle} of {length} rows in lists up to {int(own.max()) if middle else 0}: "
                f"accepted are lists below nlist={nlist}, and at most {rows.capacity} rows"
            )
        in_order = torch.arange(length, dtype=torch.int32).expand(rows.tokens.shape[1], -1)
        if not torch.equal(rows.tokens[b, :, :length].sort(-1).values, in_order):
            raise ValueError(f"its rows are not the tokens 0 to {length - 1}, each once")
    return store
