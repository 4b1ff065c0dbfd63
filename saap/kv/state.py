"""Save a KVStore's tensors and rebuild it from them."""

import torch
from jaxtyping import Int
from torch import Tensor

from saap.budget import Budget
from saap.context_file import NO_ROWS, ONE_VECTOR
from saap.index.rows import BucketRows
from saap.selector import Selector

from .file_rows import FileRows
from .shared import SharedStore
from .store import KVStore

SPARE_ROWS = 1024
OF_SELECTOR, OF_REST = "selector.", "rest."
LAYOUT = ("n_sink", "window", "flush_every")


def saved(store: KVStore) -> tuple[dict, dict[str, Tensor]]:
    """Lengths, and views of the rows with some spare ones: an opened store is written in place.

    Of a store that shares another one's rows, only what is its own.
    """
    store.settle()
    if isinstance(store, SharedStore):
        return counts_of(store), of_selector(store)
    n = store.length
    store.reserve(n + SPARE_ROWS)
    rows = store.rows
    rows.blank(store.lengths, n + SPARE_ROWS)  # what was in that memory is nobody's business
    buffers = {**rows.held, "lists": rows.lists, "tokens": rows.tokens}
    tensors = {name: buffer[:, :, : n + SPARE_ROWS] for name, buffer in buffers.items()}
    return counts_of(store), tensors | of_selector(store)


def counts_of(store: KVStore) -> dict:
    """What a header says of a store."""
    counts = {"lengths": store.lengths, "middles": store.middles}
    if isinstance(store, SharedStore):
        return counts | {NO_ROWS: True}
    return counts | {ONE_VECTOR: True} if holds_one_vector(store) else counts


def holds_one_vector(store: KVStore) -> bool:
    """Whether values are the keys, and held once."""
    return isinstance(store.rows, BucketRows) and bool(store.rows.same)


def of_selector(store: KVStore) -> dict[str, Tensor]:
    """What is saved of the selector of a settled store, and of its rest."""
    if store.selector is None:
        return {}
    if not any(store.middles):
        own = store.selector.state_before(store.batch, *store.heads)
        return {OF_SELECTOR + name: t for name, t in own.items()}
    rest = {} if isinstance(store, SharedStore) else store.rest.state(store.middles)
    parts = (OF_SELECTOR, store.selector.state()), (OF_REST, rest)
    return {prefix + name: t for prefix, state in parts for name, t in state.items()}


def restored_shared(
    header: dict, tensors: dict[str, Tensor], selector: Selector | None, owner: KVStore
) -> SharedStore:
    """A store over the rows of `owner`, which was restored already. ValueError where the two do
    not fit."""
    lengths, middles = list(header["lengths"]), list(header["middles"])
    if lengths != owner.lengths or len(middles) != len(lengths):
        raise ValueError(
            f"lengths and middles must be of sequences of {owner.lengths} tokens, as those of the "
            f"layer that it shares keys with; got {lengths} and {middles}"
        )
    store = SharedStore(selector, owner.budget, owner)
    _check_middles(lengths, middles, selector, owner.budget)
    store.restore(lengths, middles, _state_of(OF_SELECTOR, tensors))
    return store


def restored(
    header: dict,
    tensors: dict[str, Tensor],
    selector: Selector | None,
    budget: Budget,
    kv_dtype: torch.dtype | None = None,
) -> KVStore:
    """A store over these tensors, which may be mapped. Raises ValueError for lists out of range.

    The budget has to lay out rows as the one did that the store was made with.
    """
    lengths, middles = list(header["lengths"]), list(header["middles"])
    lists, tokens = tensors["lists"], tensors["tokens"]
    batch, n_kv = lists.shape[:2]
    if not len(lengths) == len(middles) == batch > 0:
        raise ValueError(
            f"lengths and middles must be of {batch} sequences, at least one; got {lengths} and "
            f"{middles}"
        )
    if selector is not None and selector.n_kv not in (None, n_kv):
        raise ValueError(f"rows must be of {selector.n_kv} heads; got {n_kv}")
    if kv_dtype is not None and tensors["k"].dtype != kv_dtype:
        raise ValueError(f"k must be of kv_dtype {kv_dtype}; got {tensors['k'].dtype}")
    n_lists = 1 if selector is None else selector.n_assigned
    in_order = selector is not None and selector.assigns_by is not None
    for b, (length, middle) in enumerate(zip(lengths, middles, strict=True)):
        check_rows(
            lists[b], tokens[b], length, middle,
            n_lists=n_lists, n_sink=budget.n_sink, in_order=in_order,
        )  # fmt: skip
    same = {"v": "k"} if header.get(ONE_VECTOR) else {}
    vectors = {name: tensors[name] for name in ("k", "v") if name not in same}
    rows = BucketRows.over(vectors, lists, tokens, same)
    store = KVStore(selector, budget, kv_dtype=kv_dtype, rows=rows)
    store.restore(lengths, middles, _state_of(OF_SELECTOR, tensors), _state_of(OF_REST, tensors))
    return store


def restored_in_file(
    header: dict,
    tensors: dict[str, Tensor],
    selector: Selector | None,
    budget: Budget,
    rows: FileRows,
    kv_dtype: torch.dtype | None = None,
) -> KVStore:
    """A store over rows in a file. Raises ValueError where the file does not hold them."""
    lengths, middles = list(header["lengths"]), list(header["middles"])
    whole = len(lengths) == len(middles) == 1 and 0 < lengths[0] <= rows.capacity
    if not whole:
        raise ValueError(
            f"{rows.file.path}: must hold rows of one sequence of {lengths} tokens; got "
            f"{rows.capacity} rows: the file was cut short"
        )
    _check_middles(lengths, middles, selector, budget)
    if kv_dtype is not None and rows.file.dtype != kv_dtype:
        raise ValueError(f"k must be of kv_dtype {kv_dtype}; got {rows.file.dtype}")
    store = KVStore(selector, budget, kv_dtype=kv_dtype, rows=rows)
    store.restore(lengths, middles, _state_of(OF_SELECTOR, tensors), _state_of(OF_REST, tensors))
    rows.n_saved = lengths[0]
    return store


def _check_middles(
    lengths: list[int], middles: list[int], selector: Selector | None, budget: Budget
) -> None:
    for length, middle in zip(lengths, middles, strict=True):
        most = 0 if selector is None else max(0, length - budget.n_sink)
        if not 0 <= middle <= most:
            raise ValueError(f"middles must be rows behind the sinks; got {middles} of {lengths}")


def _state_of(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def check_rows(
    lists: Int[Tensor, "H capacity"],
    tokens: Int[Tensor, "H capacity"],
    length: int,
    middle: int,
    *,
    n_lists: int,
    n_sink: int,
    in_order: bool,
) -> None:
    """ValueError where a sequence's rows are not those of a store."""
    capacity = lists.shape[1]
    if not 0 <= length <= capacity or not 0 <= middle <= max(0, length - n_sink):
        raise ValueError(
            f"rows must be at most {capacity}, those in lists fewer by the {n_sink} sinks; got "
            f"{middle} of {length} rows in lists"
        )
    used = lists[:, :length]
    if length and (int(used.min()) < 0 or int(used.max()) >= n_lists):
        raise ValueError(
            f"rows must be in lists 0..{n_lists - 1}; got {int(used.min())}..{int(used.max())}"
        )
    in_middle = slice(n_sink, n_sink + middle)
    place = used[:, in_middle].long() * capacity + tokens[:, in_middle]
    if in_order and (place.diff(dim=1) < 0).any():
        raise ValueError(
            "rows must lie in the order of their lists, those of one in time order; got another "
            "order"
        )
    expected = torch.arange(length, dtype=tokens.dtype, device=tokens.device)
    if not torch.equal(tokens[:, :length].sort(-1).values, expected.expand(len(tokens), -1)):
        raise ValueError(f"rows must be the tokens 0..{length - 1}, each once; got others")
    placed = torch.ones(length, dtype=torch.bool, device=tokens.device)
    placed[n_sink : n_sink + middle] = False
    if (tokens[:, :length] != expected)[:, placed].any():
        raise ValueError("rows outside the middle must be in time order; got another order")
