"""Context files: a document's KV caches in one file, memory-mapped when it is opened.

The header says what the caches belong to and how many rows they have (`saap.index.tensor_files`
checks it). `read` checks that the tensors are those of the header, and maps them: keys are read
from disk when they are visited, and what is written to them stays in memory. `verify` reads all.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from saap.index import tensor_files
from saap.index.file_fields import Fields, Layout, check_layout, check_range
from saap.kernels.attention.int8_rows import width

FORMAT = tensor_files.Format("saap.Context", 7, "`saap prefill`")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int32,)
UNSEARCHED = {"cumulative_length", "state"}
"""What only layers with a sliding window or with a state say."""
NO_ROWS = "no_rows"
"""What a layer says that has no rows of its own."""
ONE_VECTOR = "one_vector"
"""What a layer says whose values are its keys."""


def write(path: str | Path, header: dict, tensors: dict[str, Tensor]) -> None:
    """Write all; strided views are not copied as a whole. ValueError when it cannot be written."""
    tensor_files.write(path, FORMAT, header, tensors)


def read(path: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """The checked header and the mapped tensors. Raises ValueError for any other file."""
    path = Path(path)
    header, tensors = tensor_files.read(path, FORMAT)
    fields = Fields(path, header)
    check_layout(path, tensors, layout_of(fields, tensors))
    check_range(path, "token_ids", tensors["token_ids"], 0, 2**31 - 1)
    return header, tensors


def layout_of(fields: Fields, tensors: dict[str, Tensor]) -> Layout:
    """The tensors that a header asks for; `tensors` say how long the buffers of a layer are.

    A layer is searched and has lists, or has a sliding window and is kept as transformers keeps
    it, or has a state. A layer that shares another one's keys has no tensors of rows.
    """
    model = fields.section("model")
    n_kv, dim = (model.integer(name, 1, 2**16) for name in ("num_kv_heads", "head_dim"))
    fields.text("index")
    fields.section("budget")
    ids = tensors.get("token_ids")
    layout: Layout = {"token_ids": ((len(ids) if ids is not None and ids.ndim else 1,), INTEGERS)}
    states = fields.items("layers", model.integer("num_layers", 1, 2**16))
    for number, values in enumerate(states):
        state = Fields(fields.path, values, f"its header's layer {number}")
        prefix = f"layers.{number}."
        layout |= unchecked(tensors, prefix)
        if not UNSEARCHED.isdisjoint(state.values):
            layout |= window(state, tensors, prefix)
            continue
        if has_no_rows(state) and len(state.values) == 1:
            continue
        lengths, middles = state.integers("lengths"), state.integers("middles")
        if not lengths or len(lengths) != len(middles):
            raise state.wrong("middles", "one number for each of at least one length")
        if has_no_rows(state):
            continue
        first = tensors.get(prefix + "k")
        rows = first.shape[2] if first is not None and first.ndim == 4 else 0
        dtypes = (*FLOATS, torch.int8)
        if first is not None and first.dtype in dtypes:
            dtypes = (first.dtype,)
        batch = len(lengths)
        shape = batch, n_kv, rows, width(dim, dtypes[0])
        names = ("k",) if flag(state, ONE_VECTOR) else ("k", "v")
        layout |= {prefix + name: (shape, dtypes) for name in names}
        layout |= {prefix + name: ((batch, n_kv, rows), INTEGERS) for name in ("lists", "tokens")}
    return layout


def has_no_rows(state: Fields) -> bool:
    """Whether a layer has no rows of its own; with nothing else to say, nothing at all."""
    return flag(state, NO_ROWS)


def flag(state: Fields, name: str) -> bool:
    if state.values.get(name, True) is not True:
        raise state.wrong(name, "true, or not at all")
    return name in state.values


def window(state: Fields, tensors: dict[str, Tensor], prefix: str) -> Layout:
    """What a layer with a sliding window saved, as long and wide as it may be; none of a state."""
    if "state" in state.values:
        return {}
    state.integer("cumulative_length")
    first = tensors.get(prefix + "keys")
    fits = first is not None and first.ndim == 4 and first.dtype in FLOATS
    shape = (1, *first.shape[1:]) if fits else (1, 1, 1, 1)
    return {prefix + n: (shape, (first.dtype,) if fits else FLOATS) for n in ("keys", "values")}


def unchecked(tensors: dict[str, Tensor], prefix: str) -> Layout:
    """What a layer's selector, the rest of its rows and its state saved, and check themselves."""
    starts = tuple(prefix + part for part in ("selector.", "rest.", "state."))
    own = {name: t for name, t in tensors.items() if name.startswith(starts)}
    return {name: (tuple(t.shape), (t.dtype,)) for name, t in own.items()}


def verify(path: str | Path, progress: Callable[[str], None] = lambda name: None) -> None:
    """Read a whole file; ValueError names the first tensor that is not as it was saved."""
    tensor_files.verify(path, *read(path), progress)
