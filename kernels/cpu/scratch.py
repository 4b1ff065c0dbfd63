"""Memory for the length of a call, which the thread's next call has again."""

import threading
from typing import Any

import torch
from torch import Tensor

MOST_HELD = 64 * 2**20
"""Bytes that a thread keeps from one call to the next."""

_LINE = 64

_local = threading.local()


def whole_lines(n_bytes: int) -> int:
    """Bytes filled up to whole cache lines."""
    return -(-n_bytes // _LINE) * _LINE


class Layout:
    """Where buffers of so many bytes lie, one after the other, each on a cache line of its own.

    `offsets`: bytes from the address that `held` gives to each buffer.
    """

    _placed: tuple[int, Any] = (0, None)  # the last address, and a job placed there

    def __init__(self, sizes: dict[str, int]):
        self.offsets, at = {}, 0
        for name, size in sizes.items():
            self.offsets[name] = at
            at += whole_lines(size)
        self.n_bytes = at + _LINE

    def held(self) -> tuple[Tensor, int]:
        """The memory, to be held on to, and the address of the first buffer in it.

        Fresh pages would cost as much as the work. Another call of this thread writes over it.
        """
        memory, address = getattr(_local, "memory", (None, 0))
        if memory is None or memory.numel() < self.n_bytes:
            memory = torch.empty(self.n_bytes, dtype=torch.uint8)
            address = whole_lines(memory.data_ptr())
            _local.memory = (memory, address) if self.n_bytes <= MOST_HELD else (None, 0)
        return memory, address

    def copy_of(self, job):
        """A copy of a job, always the same one, that knows where its buffers are, by their names;
        and the memory, to be held on to."""
        memory, address = self.held()
        at, placed = self._placed
        if at != address:
            placed = type(job).from_buffer_copy(job)
            for name, offset in self.offsets.items():
                setattr(placed, name, address + offset)
            self._placed = address, placed
        return type(job).from_buffer_copy(placed), memory


def scratch(sizes: dict[str, int]) -> tuple[Tensor, dict[str, int]]:
    """Room for each buffer of so many bytes, as `Layout` has it, and their addresses."""
    layout = Layout(sizes)
    memory, address = layout.held()
    return memory, {name: address + offset for name, offset in layout.offsets.items()}
