"""Slots by plain loops: never optimised."""

import errno
import os

from torch import Tensor

from .api import Slots


def fetch(
    slots: Slots, starts: Tensor, lengths: Tensor, room: Tensor,
    file: int, first_byte: int, record_bytes: int, head_bytes: int,
) -> tuple[int, int]:  # fmt: skip
    """As `api.fetch`, which has checked; ranges go to `room`. Returns how many, and rows read."""
    heads, size = slots.row_in.shape
    per_head = len(starts) // heads
    wanted = [
        [row for s, n in zip(*pair, strict=True) for row in range(s, s + n)]
        for pair in zip(starts.tolist(), lengths.tolist(), strict=True)
    ]
    for number, rows in enumerate(wanted):
        head = number // per_head
        for row in rows:
            slot = int(slots.slot_of[head, row])
            if slot >= 0:
                slots.used[head, slot], slots.spared[head, slot] = slots.step, 1
    most = n_read = 0
    for number, rows in enumerate(wanted):
        head, ranges = number // per_head, []
        for row in rows:
            slot = int(slots.slot_of[head, row])
            if slot < 0:
                slot = _freed(slots, head, size)
                target = slots.rows[head, slot].reshape(-1).view(-1).numpy().view("uint8")
                place = first_byte + row * record_bytes + head * head_bytes
                if os.preadv(file, [target], place) != head_bytes:
                    raise OSError(errno.EIO, f"ends before row {row}")
                slots.slot_of[head, row], slots.row_in[head, slot] = slot, row
                slots.used[head, slot], slots.spared[head, slot] = slots.step, 0
                n_read += 1
            if ranges and slot == ranges[-1][0] + ranges[-1][1]:
                ranges[-1][1] += 1
            else:
                ranges.append([slot, 1])
        for i, (first, count) in enumerate(ranges):
            room[0, number, i], room[1, number, i] = first, count
        most = max(most, len(ranges))
    return most, n_read


def _freed(slots: Slots, head: int, size: int) -> int:
    """A slot that this step does not use; the row that was in it has none any more."""
    while True:
        slot = int(slots.hands[head])
        slots.hands[head] = (slot + 1) % size
        row = int(slots.row_in[head, slot])
        if row >= 0 and slots.used[head, slot] == slots.step:
            continue
        if row >= 0 and slots.spared[head, slot]:
            slots.spared[head, slot] = 0
            continue
        if row >= 0:
            slots.slot_of[head, row] = -1
        return slot
