"""Rows of a KV store in a file, those that steps ask for in memory.

`FileRows` stands in for `saap.index.rows.BucketRows` where rows stay in time order.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int, Int32, Shaped
from torch import Tensor

from saap.kernels.slots import Slots, fetch

from .row_file import HEADER, RowFile

OF_SLOT = 13  # bytes beside the row of a slot: which row, its last step, whether it is spared


@functools.lru_cache(maxsize=2)
def counted(n: int) -> Int32[Tensor, " n"]:
    """0 to n - 1, once for all layers of a context. Not to be written to."""
    return torch.arange(n, dtype=torch.int32)


@dataclass
class RowReads:
    """Rows of KV heads, key and value, that sparse steps asked for: `hits` of them were in memory,
    `bytes_read` were read for the others. `bytes_written`: of the tokens that came."""

    asked: int = 0
    hits: int = 0
    bytes_read: int = 0
    bytes_written: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the rows that were in memory; 1 where none was asked for."""
        return self.hits / self.asked if self.asked else 1.0

    def __add__(self, other: "RowReads") -> "RowReads":
        return RowReads(
            *(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True))
        )


class FileRows:
    """Keys and values of one sequence of one layer, as `RowFile` keeps them.

    Args:
        create: makes the file when the first keys come; given keys `[1, Hkv, T, width]`.
        fast_bytes: rows of the latest sparse steps that are kept in memory, in bytes. None: none
            are, steps look into the mapped file, and what of it is in memory is up to the
            operating system.
        file: the file, where there is one already.
    """

    names = ("k", "v")
    plain = True  # row i holds token i

    def __init__(
        self,
        create: Callable[[Tensor], RowFile],
        fast_bytes: int | None = None,
        file: RowFile | None = None,
    ):
        self._create, self.fast_bytes, self.file = create, fast_bytes, file
        self.reads = RowReads()
        self.n_saved = 0
        """Rows that a saved state counts on: they may not be written to."""
        self._slots: Slots | None = None
        self._mapped: Tensor | None = None

    @property
    def vectors(self) -> dict[str, Shaped[Tensor, "1 Hkv capacity width"]]:
        """Keys and values as they lie in the file, which is mapped: see `unmap`."""
        if self.file is None:
            return {}
        if self._mapped is None:
            self._mapped = self.file.mapped().permute(2, 1, 0, 3).unsqueeze(1)
        return {"k": self._mapped[0], "v": self._mapped[1]}

    def close(self) -> None:
        """Nothing can be read or written any more."""
        self.unmap()
        if self.file is not None:
            self.file.close()

    def clear(self) -> None:
        """The file stays: its rows are written over."""
        self.unmap()

    def unmap(self) -> None:
        """What was looked at of the mapped file is no longer this process's memory."""
        self._mapped = None

    @property
    def lists(self) -> Int[Tensor, "1 Hkv capacity"]:
        """All rows are in list 0. One number stands for all: not to be written to."""
        return torch.zeros(1, dtype=torch.int32).expand(1, self.file.n_kv, self.capacity)

    @property
    def tokens(self) -> Int[Tensor, "1 Hkv capacity"]:
        """The token in each row has the number of the row. Not to be written to."""
        return counted(self.capacity).expand(1, self.file.n_kv, -1)

    @property
    def capacity(self) -> int:
        return 0 if self.file is None else self.file.capacity

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return 0 if self._slots is None else self._slots.nbytes

    @property
    def file_bytes(self) -> int:
        """Bytes on the disk."""
        return 0 if self.file is None else HEADER + self.capacity * self.file.record_bytes

    def reserve(self, n: int, like: Tensor, used: int) -> None:
        """Take room for n rows from the disk. ValueError where it has none, and for a batch."""
        if len(like) != 1:
            raise ValueError(
                f"a context in files must be one sequence; got a batch of {len(like)}"
            )
        if self.file is None:
            self.file = self._create(like)
        if n <= self.capacity:
            return
        self.file.reserve(n)
        self.unmap()
        if self._slots is not None:
            self._slots.make_room(self.capacity)

    def write(
        self, sequence: slice | int, start: int, vectors: Sequence[Tensor], lists: Tensor | int
    ) -> None:
        """Write new keys and values `[1 or none, Hkv, T, width]` to the rows from `start`."""
        k, v = (t[0] if t.ndim == 4 else t for t in vectors)
        if start < self.n_saved:
            raise ValueError(
                f"rows from {self.n_saved} on may be written, since those before are saved; got "
                f"row {start}"
            )
        self.file.write(start, k, v)
        self.reads.bytes_written += k.shape[1] * self.file.record_bytes
        if self._slots is not None:
            self._slots.forget(start, start + k.shape[1])

    def read_keys(self, first: int, last: int) -> Shaped[Tensor, "Hkv n width"]:
        """A copy of some keys, which leaves no part of the file mapped."""
        return self.file.read(first, last)[:, :, 0].transpose(0, 1).contiguous()

    def permute(self, sequence: int, first: int, order: Int[Tensor, "H n"], n_kept: int = 0):
        """Rows stay where they are. ValueError for any other order."""
        if (order != torch.arange(order.shape[1])).any():
            raise ValueError("rows in a file must stay in time order; got another order")

    def select(self, sequences: Int[Tensor, " B2"], used: int) -> None:
        """Nothing changes. ValueError for anything but the one sequence."""
        if sequences.tolist() != [0]:
            raise ValueError(
                f"a context in files must stay one sequence; got sequences {sequences.tolist()}"
            )

    def in_memory(
        self, starts: Int32[Tensor, "1 H R"], lengths: Int32[Tensor, "1 H R"]
    ) -> tuple[Tensor, Tensor, Int32[Tensor, "1 H M"], Int32[Tensor, "1 H M"]]:
        """Keys and values `[1, Hkv, rows, width]`, and the ranges in them that a step visits.

        Rows that are not in memory are read. Where the step asks for more than there is memory
        for, as one over every row does, these are the mapped file and the ranges as they are.
        """
        file = self.file
        n_slots = min(self._most_slots, self.capacity)
        per_head = int(lengths.reshape(file.n_kv, -1).sum(1, dtype=torch.int64).amax())
        if per_head > n_slots:
            rows = self.vectors
            self.unmap()  # with the last use of these
            return rows["k"], rows["v"], starts, lengths
        if self._slots is None or self._slots.row_in.shape[1] < n_slots:
            rows = torch.empty(file.n_kv, n_slots, 2, file.width, dtype=file.dtype)
            self._slots = Slots.of(rows, self.capacity)
        try:
            *ranges, n_read = fetch(
                self._slots, starts[0], lengths[0], file=file.fileno(), first_byte=HEADER,
                record_bytes=file.record_bytes, head_bytes=file.head_bytes,
            )  # fmt: skip
        except OSError as error:
            raise ValueError(f"{file.path}: cannot be read ({error.strerror})") from error
        asked = int(lengths.sum(dtype=torch.int64))
        self.reads += RowReads(asked, asked - n_read, n_read * file.head_bytes)
        k, v = self._slots.rows.permute(2, 0, 1, 3).unsqueeze(1)
        return k, v, *(t.unsqueeze(0) for t in ranges)

    @property
    def _most_slots(self) -> int:
        if self.fast_bytes is None:
            return 0
        return self.fast_bytes // (self.file.n_kv * (self.file.head_bytes + OF_SLOT))
