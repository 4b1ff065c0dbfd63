"""Bring the rows that a step asks for into memory: those that are not there are read from a file.

A row of a KV head, key and value together, lies in a slot. A row that is asked for and has no slot
takes that of a row that was not asked for since the hand last passed it (the clock algorithm, an
approximation of least recently used) and not by this step.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int32, Int64, Shaped
from torch import Tensor

from saap.kernels import backends

Impl = Literal["reference", "numba"]


@dataclass
class Slots:
    """Memory for S rows of each of H heads, and what lies in it.

    `rows [H, S, ...]`: contents, those of a slot contiguous. `slot_of [H, N]` int32: the slot of
    each row of the file, -1 for none. `row_in [H, S]` int32: the row in each slot, -1 for none.
    `used [H, S]` int64: the step that last asked for it. `spared [H, S]` uint8: whether the hand
    is to pass it once more. `hands [H]` int64. `step`: how many there were.
    """

    rows: Shaped[Tensor, "H S ..."]
    slot_of: Int32[Tensor, "H N"]
    row_in: Int32[Tensor, "H S"]
    used: Int64[Tensor, "H S"]
    spared: Shaped[Tensor, "H S"]
    hands: Int64[Tensor, " H"]
    step: int = 0

    @classmethod
    def of(cls, rows: Shaped[Tensor, "H S ..."], n_rows: int) -> "Slots":
        """Empty slots for the rows 0 to `n_rows - 1`."""
        heads, size = rows.shape[:2]
        return cls(
            rows,
            torch.full((heads, n_rows), -1, dtype=torch.int32),
            torch.full((heads, size), -1, dtype=torch.int32),
            torch.zeros(heads, size, dtype=torch.int64),
            torch.zeros(heads, size, dtype=torch.uint8),
            torch.zeros(heads, dtype=torch.int64),
        )

    @property
    def nbytes(self) -> int:
        held = (self.rows, self.slot_of, self.row_in, self.used, self.spared, self.hands)
        return sum(t.nbytes for t in held)

    def make_room(self, n_rows: int) -> None:
        """The file has `n_rows` rows now, at least as many as before."""
        more = n_rows - self.slot_of.shape[1]
        if more > 0:
            new = torch.full((len(self.slot_of), more), -1, dtype=torch.int32)
            self.slot_of = torch.cat([self.slot_of, new], 1)

    def forget(self, first: int, last: int) -> None:
        """The rows from `first` to before `last` have changed in the file."""
        for head, slots in enumerate(self.slot_of[:, first:last]):
            self.row_in[head, slots[slots >= 0].long()] = -1
        self.slot_of[:, first:last] = -1


def fetch(
    slots: Slots,
    starts: Int32[Tensor, "lists R"],
    lengths: Int32[Tensor, "lists R"],
    *,
    file: int,
    first_byte: int,
    record_bytes: int,
    head_bytes: int,
    impl: Impl | None = None,
) -> tuple[Int32[Tensor, "lists M"], Int32[Tensor, "lists M"], int]:
    """Ranges of slots that hold what the ranges of rows ask for; missing rows are read.

    Args:
        starts, lengths: ranges of rows; as many lists for each head, one head after the other.
            All lists of a head together ask for at most S rows.
        file: descriptor of a file where row `i` of head `h` lies `i * record_bytes + h *
            head_bytes` behind `first_byte`.
        impl: `"reference"`, `"numba"`, or None, the best that is installed.

    Returns:
        Ranges of slots, in the order of the rows, and how many rows were read.

    Raises:
        ValueError: more rows than slots, or rows that are not in the file, by number.
        OSError: the file ends before a row that was asked for, or cannot be read.
    """
    heads, size = slots.row_in.shape
    if starts.shape != lengths.shape or len(starts) % heads:
        raise ValueError(
            f"starts and lengths must be [lists, R], lists a multiple of the {heads} heads; got "
            f"{tuple(starts.shape)} and {tuple(lengths.shape)}"
        )
    asked = lengths.sum(1, dtype=torch.int64)
    most = int(asked.view(heads, -1).sum(1).amax())
    if most > size:
        raise ValueError(f"a step must ask for at most {size} rows of a head; got {most}")
    last = int(torch.where(lengths > 0, starts + lengths, 0).amax()) if starts.numel() else 0
    if last > slots.slot_of.shape[1] or (starts.numel() and int(starts.amin()) < 0):
        raise ValueError(f"rows must be in 0..{slots.slot_of.shape[1] - 1}; got row {last - 1}")
    room = torch.zeros(2, len(starts), max(1, int(asked.amax())), dtype=torch.int32)
    slots.step += 1
    backend = backends.chosen(__package__, ("reference", "numba"), impl, "numba", _no_limit)
    places = (file, first_byte, record_bytes, head_bytes)
    used, read = backend.fetch(slots, starts.contiguous(), lengths.contiguous(), room, *places)
    return room[0, :, :used], room[1, :, :used], read


def _no_limit(backend) -> None:
    """Each does all."""
