"""Context folders: a document's KV caches in files that grow, and what was last saved of them.

`context` is a file of the usual format (`saap.index.tensor_files`), replaced as a whole at each
save: what the caches belong to, tokens, codes, and how many rows of each layer count.
`layer-0000.rows` and so on hold keys and values (`saap.kv.row_file`); rows beyond that number are
ignored. `lock` is held by the one process that uses the folder.
"""

import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from saap.context_file import NO_ROWS, UNSEARCHED, has_no_rows, unchecked, window
from saap.index import tensor_files
from saap.index.atomic_files import remove_leftovers
from saap.index.file_fields import Fields, Layout, check_layout, check_range
from saap.kv.row_file import DIGESTED, RowFile

try:
    import fcntl
except ImportError:  # Windows: nothing keeps a second process out
    fcntl = None

FORMAT = tensor_files.Format("saap.ContextFolder", 5, "`save_context`")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
STATE, LOCK = "context", "lock"


class ContextFolder:
    """A folder in use by this process; closed with the object, or by `close`.

    Raises ValueError for a folder that cannot be made or written, one that another process or
    cache uses, and, with `new`, one that holds a context already.
    """

    def __init__(self, path: str | Path, *, new: bool):
        self.path = Path(path).absolute()  # wherever the process goes
        if not new and not (self.path / STATE).is_file():
            raise ValueError(
                f"{self.path}: must be a folder that `save_context` has saved a context in; got "
                + ("one that holds none" if self.path.is_dir() else "no such folder")
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / LOCK, "ab")  # noqa: SIM115
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be written ({error.strerror})") from error
        self._take()
        self.id = secrets.token_hex(16)
        if new:
            self._clear()

    def _take(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise ValueError(
                f"{self.path}: must be used by one cache at a time; got a second one: close() the "
                "first, or end its process"
            ) from None

    def _clear(self) -> None:
        """Rows of a context that was never saved go; anything else is not ours to remove."""
        remove_leftovers(self.path / STATE)
        held = sorted(entry.name for entry in self.path.iterdir() if entry.name != LOCK)
        kept = [name for name in held if not re.fullmatch(r"layer-\d{4,}\.rows", name)]
        if kept:
            self.close()
            what = "a saved context: open it with open_context" if STATE in kept else kept[0]
            raise ValueError(f"{self.path}: must be a new or an empty folder; got {what}")
        for name in held:
            (self.path / name).unlink()

    def close(self) -> None:
        """Let another process use the folder."""
        self._lock.close()

    def file_of(self, number: int) -> Path:
        return self.path / f"layer-{number:04}.rows"

    def create(self, number: int, like: Tensor) -> RowFile:
        return RowFile.create(self.file_of(number), self.id, number, like)

    def open(self, number: int, n_kv: int, dim: int) -> RowFile:
        return RowFile.open(self.file_of(number), self.id, number, n_kv, dim)

    def check_is_here(self) -> None:
        """ValueError if the folder was moved or replaced since: rows are still written to it, but
        what is saved of them would not be."""
        try:
            here = os.path.samestat(os.fstat(self._lock.fileno()), os.stat(self.path / LOCK))
        except OSError:
            here = False
        if not here:
            raise ValueError(
                f"{self.path}: must stay where it is while a cache uses it; got a folder that was "
                "moved or replaced: close the cache, and open the context where it is now"
            )

    def write(self, header: dict, tensors: dict[str, Tensor]) -> None:
        """Replace what was saved. The rows that it counts on must be on the disk already."""
        self.check_is_here()
        tensor_files.write(self.path / STATE, FORMAT, {**header, "folder": self.id}, tensors)
        if hasattr(os, "O_DIRECTORY"):
            folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def forget(self) -> None:
        """Nothing is saved any more."""
        self.check_is_here()
        (self.path / STATE).unlink(missing_ok=True)

    def read(self) -> tuple[dict, dict[str, Tensor]]:
        """The checked header and tensors. Raises ValueError for any other file."""
        path = self.path / STATE
        header, tensors = tensor_files.read(path, FORMAT)
        fields = Fields(path, header)
        check_layout(path, tensors, layout_of(fields, tensors))
        check_range(path, "token_ids", tensors["token_ids"], 0, 2**31 - 1)
        self.id = fields.text("folder")
        return header, tensors


def layout_of(fields: Fields, tensors: dict[str, Tensor]) -> Layout:
    """The tensors that a header asks for."""
    model = fields.section("model")
    for name in ("num_kv_heads", "head_dim"):
        model.integer(name, 1, 2**16)
    fields.text("index")
    fields.section("budget")
    ids = tensors.get("token_ids")
    n_tokens = len(ids) if ids is not None and ids.ndim else 1
    layout: Layout = {"token_ids": ((n_tokens,), (torch.int32,))}
    for number, values in enumerate(fields.items("layers", model.integer("num_layers", 1, 2**16))):
        state = Fields(fields.path, values, f"its header's layer {number}")
        prefix = f"layers.{number}."
        layout |= unchecked(tensors, prefix)
        if not UNSEARCHED.isdisjoint(state.values):
            layout |= window(state, tensors, prefix)
            continue
        if has_no_rows(state) and len(state.values) == 1:
            continue
        if state.integers("lengths") != [n_tokens]:
            raise state.wrong("lengths", f"the {n_tokens} tokens of one sequence")
        if len(state.integers("middles")) != 1:
            raise state.wrong("middles", "one number for the one sequence")
        if not has_no_rows(state):
            layout[prefix + "digests"] = ((-(-n_tokens // DIGESTED), 32), (torch.uint8,))
    return layout


def verify(path: str | Path, progress: Callable[[str], None] = lambda name: None) -> None:
    """Read a whole folder; ValueError names the first thing that is not as it was saved."""
    folder = ContextFolder(path, new=False)
    try:
        header, tensors = folder.read()
        tensor_files.verify(folder.path / STATE, header, tensors, progress)
        model = header["model"]
        for number, state in enumerate(header["layers"]):
            if "lengths" not in state or NO_ROWS in state:
                continue
            file = folder.open(number, model["num_kv_heads"], model["head_dim"])
            progress(file.path.name)
            n = state["lengths"][0]
            if file.capacity < n or not torch.equal(
                file.digests(n), tensors[f"layers.{number}.digests"]
            ):
                raise ValueError(
                    f"{file.path}: its first {n} rows must fit their checksums; got others: the "
                    "file was altered or cut short"
                )
    finally:
        folder.close()
