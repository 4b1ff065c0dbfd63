"""Caches whose keys and values lie in a folder."""

import functools
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from saap.budget import LEAST_FLUSH, Budget
from saap.context_folder import ContextFolder
from saap.index.tensor_files import SAFETENSORS_DTYPES
from saap.kernels.attention.int8_rows import width
from saap.kv import state as kv_state
from saap.kv.file_rows import OF_SLOT, FileRows, RowReads

from . import options, unsearched
from .models import heads_of

METHODS = ("saap", "dense")


class CacheFolder:
    """The folder of one cache. `fast_memory`: bytes for rows of all its layers; None: none.

    Raises ValueError for what is not supported (other methods, a group, a GPU), and for memory
    that does not hold what one step visits.
    """

    def __init__(self, saap_model, path: str | Path, fast_memory: int | None, *, new: bool):
        check(saap_model, fast_memory)
        self.model = saap_model
        layers = [layer for layer in saap_model.layers if layer.is_full]
        self.fast_bytes = None if fast_memory is None else fast_memory // max(1, len(layers))
        self.n_sharing = Counter(layer.shares for layer in layers)
        self.folder = ContextFolder(path, new=new)
        self.rows: dict[int, FileRows] = {}
        self.tokens = torch.zeros(0, dtype=torch.int32)
        """Those that are saved."""
        self.digests: dict[int, Tensor] = {}
        self.note: dict = {}

    @property
    def path(self) -> Path:
        return self.folder.path

    @property
    def reads(self) -> RowReads:
        return sum((rows.reads for rows in self.rows.values()), RowReads())

    @property
    def file_bytes(self) -> int:
        return sum(rows.file_bytes for rows in self.rows.values())

    def new_rows(self, number: int) -> FileRows:
        """Rows of a new layer; its file is made when the first keys come."""
        create = functools.partial(self.folder.create, number)
        self.rows[number] = FileRows(create, self._fast_bytes_of(number))
        return self.rows[number]

    def opened_rows(self, number: int, n_kv: int, dim: int) -> FileRows:
        file = self.folder.open(number, n_kv, dim)
        self.rows[number] = FileRows(lambda like: file, self._fast_bytes_of(number), file)
        return self.rows[number]

    def _fast_bytes_of(self, number: int) -> int | None:
        """For the rows that a layer's steps visit, and those of layers that share its rows."""
        if self.fast_bytes is None:
            return None
        return self.fast_bytes * (1 + self.n_sharing[number])

    def close(self) -> None:
        for rows in self.rows.values():
            rows.close()
        self.folder.close()

    def before_forward(self, cache) -> None:
        """Cut the saved context first, if saved tokens are about to be overwritten.

        So a process that is killed leaves the context as it was saved, or cut.
        """
        n = len(self.tokens)
        left = min((layer.store.length for layer in cache.saap_layers), default=n)
        if left >= n:
            return
        if left:
            self.save(cache, self.tokens[:left])
            return
        self.folder.forget()
        self._saved(self.tokens[:0], {})

    def save(self, cache, tokens: Tensor, note: dict | None = None) -> None:
        """Save the rows, then the file that counts them; raises what `save_context` raises."""
        from .cache import SaapLayer
        from .contexts import header_of

        self.note = self.note if note is None else note
        layers, tensors, digests = [], {"token_ids": tokens.to(torch.int32).cpu()}, {}
        n, n_known = len(tokens), len(self.tokens)
        for number, layer in enumerate(cache.layers):
            prefix = f"layers.{number}."
            if not isinstance(layer, SaapLayer):
                facts, own = unsearched.saved(layer)
            else:
                store = layer.store
                store.settle()
                facts, own = kv_state.counts_of(store), kv_state.of_selector(store)
                own |= unsearched.saved_state(layer)
            if number in self.rows:
                file, known = self.rows[number].file, self.digests.get(number)
                file.sync()
                own["digests"] = digests[number] = file.digests(n, known, min(n, n_known))
            layers.append(facts)
            tensors |= {prefix + name: t for name, t in own.items()}
        self.folder.write(header_of(self.model, cache, layers, self.note), tensors)
        self._saved(tensors["token_ids"], digests)

    def _saved(self, tokens: Tensor, digests: dict[int, Tensor]) -> None:
        self.tokens, self.digests = tokens.clone(), digests
        for rows in self.rows.values():
            rows.n_saved = len(tokens)


def check(saap_model, fast_memory: int | None) -> None:
    """ValueError for a model, method or memory that does not work with rows in files."""
    if saap_model.method.name not in METHODS:
        raise ValueError(
            f"a cache in a directory needs method {' or '.join(METHODS)}, which leave rows in "
            f"time order; got {saap_model.method.name!r}"
        )
    options.check_can_be_saved(saap_model.model, saap_model.layers)
    if saap_model.group is not None:
        raise ValueError("a cache in a directory must be whole in one process; got a group")
    model = saap_model.model
    if model.device.type != "cpu":
        raise ValueError(f"a cache in a directory needs a model on the CPU; got {model.device}")
    dtype = saap_model.kv_dtype or model.dtype
    if dtype not in SAFETENSORS_DTYPES:
        raise ValueError(f"a cache in a directory needs 32 bits a number or fewer; got {dtype}")
    if fast_memory is None:
        return
    wanted = least_memory(saap_model)
    if isinstance(fast_memory, bool) or not isinstance(fast_memory, int) or fast_memory < wanted:
        raise ValueError(
            f"fast_memory must be None or at least {wanted:,} bytes, to hold what one step visits "
            f"of each layer; got {fast_memory!r}"
        )


def least_memory(saap_model) -> int:
    """Bytes for sinks, window and the rows that a step of this budget chooses, of all layers."""
    heads, n_kv, dim = heads_of(saap_model.model.config)
    budget: Budget = saap_model.budget
    dtype = saap_model.kv_dtype or saap_model.model.dtype
    lists = heads // n_kv if budget.share == "head" else 1
    rows = budget.n_sink + budget.window + LEAST_FLUSH + (budget.max_tokens or 0)
    n_layers = sum(layer.is_full for layer in saap_model.layers)
    return n_layers * lists * rows * n_kv * (2 * width(dim, dtype) * dtype.itemsize + OF_SLOT)
