"""Keys and values of one layer in a file that grows: a header, then a record for each token.

A record holds `[Hkv, 2, width]`, key and value of each KV head, so rows are only ever added at
the end. Room is taken from the disk before rows are written (`posix_fallocate`), and rows are
written by `pwrite`: a full disk is an error of that call, never a signal later. What of a file
counts, and that it is whole, says whoever keeps its number of rows (`saap.context_folder`).
"""

import contextlib
import errno
import hashlib
import json
import mmap
import os
from pathlib import Path

import torch
from torch import Tensor

from saap.index import tensor_files
from saap.index.file_fields import Fields
from saap.kernels.attention import int8_rows

KIND, VERSION = "saap.Rows", 1
HEADER = 4096  # bytes, of a page: records begin behind it
GROWTH = 8  # a full file grows by an eighth
SPARE_ROWS = 256
WRITTEN_AT_ONCE = 2048  # rows
DIGESTED = 4096  # rows of a checksum
DTYPES = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}  # fmt: skip


class RowFile:
    """An open file of rows of one layer. Not for several threads, nor for several processes.

    `capacity`: rows that there is room for on the disk. The file is closed with the object.
    """

    def __init__(self, path: Path, file, n_kv: int, width: int, dtype: torch.dtype):
        self.path, self.n_kv, self.width, self.dtype = path, n_kv, width, dtype
        self._file = file
        self.head_bytes = 2 * width * dtype.itemsize
        self.record_bytes = n_kv * self.head_bytes
        self.capacity = max(0, os.fstat(file.fileno()).st_size - HEADER) // self.record_bytes

    @classmethod
    def create(cls, path: Path, folder_id: str, number: int, like: Tensor) -> "RowFile":
        """A new file for keys as `like [B, Hkv, T, width]`. ValueError when it cannot be made."""
        dtype = next(name for name, dtype in DTYPES.items() if dtype == like.dtype)
        header = _header(folder_id, number, like.shape[1], like.shape[3], dtype)
        try:
            file = open(path, "xb+", buffering=0)  # noqa: SIM115
            file.write(json.dumps(header).encode().ljust(HEADER - 1) + b"\n")
        except OSError as error:
            raise ValueError(f"{path}: cannot be written ({error.strerror})") from error
        return cls(path, file, like.shape[1], like.shape[3], like.dtype)

    @classmethod
    def open(cls, path: Path, folder_id: str, number: int, n_kv: int, dim: int) -> "RowFile":
        """A file that `create` made for this folder and layer. ValueError for any other."""
        try:
            file = open(path, "rb+", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise ValueError(f"{path}: cannot be opened ({error.strerror})") from error
        try:
            values = json.loads(file.read(HEADER))
        except (ValueError, RecursionError):
            values = None
        header = Fields(path, values if isinstance(values, dict) else {})
        if header.values.get("kind") != KIND or header.values.get("version") != VERSION:
            raise ValueError(f"{path}: must be rows of a context, version {VERSION}; got another")
        dtype = header.text("dtype", DTYPES)
        width = int8_rows.width(dim, DTYPES[dtype])
        if header.values != _header(folder_id, number, n_kv, width, dtype):
            raise ValueError(
                f"{path}: must be layer {number} of this context, {n_kv} KV heads of {dim}; got "
                "another, or an altered header"
            )
        return cls(path, file, n_kv, width, DTYPES[dtype])

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()

    def reserve(self, n: int) -> None:
        """Take room for n rows from the disk. ValueError where it has none: nothing changes."""
        if n <= self.capacity:
            return
        rows = max(n, self.capacity + self.capacity // GROWTH) + SPARE_ROWS
        held, wanted = (HEADER + r * self.record_bytes for r in (self.capacity, rows))
        try:
            _allocate(self.fileno(), held, wanted - held)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self.fileno(), held)
            raise ValueError(
                f"{self.path}: there must be room for {wanted - held:,} bytes more; got "
                f"{error.strerror}"
            ) from error
        self.capacity = rows

    def write(self, start: int, k: Tensor, v: Tensor) -> None:
        """Write `k, v [Hkv, T, width]`, of any float dtype or the file's, from row `start`."""
        length = k.shape[1]
        for first in range(0, length, WRITTEN_AT_ONCE):
            own = slice(first, min(first + WRITTEN_AT_ONCE, length))
            shape = (own.stop - first, self.n_kv, 2, self.width)
            block = torch.empty(shape, dtype=self.dtype)
            block[:, :, 0], block[:, :, 1] = (t[:, own].transpose(0, 1) for t in (k, v))
            self._write(HEADER + (start + first) * self.record_bytes, bytes_of(block))

    def _write(self, place: int, content: memoryview) -> None:
        try:
            while content:
                done = os.pwrite(self.fileno(), content, place)
                content, place = content[done:], place + done
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be written ({error.strerror})") from error

    def read(self, first: int, last: int) -> Tensor:
        """A copy of the rows from `first` to before `last`: `[T, Hkv, 2, width]`."""
        block = torch.empty(last - first, self.n_kv, 2, self.width, dtype=self.dtype)
        content, place = bytes_of(block), HEADER + first * self.record_bytes
        while content:
            done = os.preadv(self.fileno(), [content], place)
            if done <= 0:
                raise OSError(errno.EIO, f"{self.path} ends before row {last - 1}")
            content, place = content[done:], place + done
        return block

    def mapped(self) -> Tensor:
        """All rows, `[capacity, Hkv, 2, width]`, as they are in the file: read from the disk as
        they are looked at, unmapped with the last tensor that uses them."""
        n_bytes = self.capacity * self.record_bytes
        memory = mmap.mmap(self.fileno(), HEADER + n_bytes)
        flat = torch.frombuffer(
            memory, dtype=self.dtype, offset=HEADER, count=n_bytes // self.dtype.itemsize
        )
        return flat.view(self.capacity, self.n_kv, 2, self.width)

    def sync(self) -> None:
        """Wait until all that was written is on the disk. ValueError when it cannot be."""
        try:
            os.fsync(self.fileno())
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be written ({error.strerror})") from error

    def digests(self, n: int, known: Tensor | None = None, n_known: int = 0) -> Tensor:
        """SHA-256 of each `DIGESTED` of the first n rows, `[blocks, 32]` uint8.

        `known`: those of the first `n_known` rows, whose whole blocks are taken as they are.
        """
        kept = n_known // DIGESTED
        found = [] if known is None else [known[:kept]]
        for first in range(kept * DIGESTED, n, DIGESTED):
            digest = hashlib.sha256(bytes_of(self.read(first, min(first + DIGESTED, n)))).digest()
            found.append(torch.frombuffer(bytearray(digest), dtype=torch.uint8)[None])
        return torch.cat(found) if found else torch.zeros(0, 32, dtype=torch.uint8)


def bytes_of(block: Tensor) -> memoryview:
    return memoryview(block.view(-1).view(torch.uint8).numpy())


def _header(folder_id: str, number: int, n_kv: int, width: int, dtype: str) -> dict:
    header = {
        "kind": KIND, "version": VERSION, "folder": folder_id, "layer": number,
        "num_kv_heads": n_kv, "width": width, "dtype": dtype,
    }  # fmt: skip
    return {**header, "sha256": tensor_files.header_digest(header)}


def _allocate(file: int, place: int, n_bytes: int) -> None:
    """Room on the disk; a hole where the system cannot take room."""
    try:
        os.posix_fallocate(file, place, n_bytes)
    except AttributeError:
        os.ftruncate(file, place + n_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(file, place + n_bytes)
