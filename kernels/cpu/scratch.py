"""Memory for the length of a call, which the thread's next call has again."""

import threading

import torch
from torch import Tensor

MOST_HELD = 64 * 2**20
"""Bytes that a thread keeps from one call to the next."""

_ALIGNED = 64

_local = threading.local()


def scratch(sizes: dict[str, int]) -> tuple[Tensor, dict[str, int]]:
    """Room for each buffer of so many bytes: the memory, to be held on to, and their addresses.

    Fresh pages would cost as much as the work. Another call of this thread writes over it.
    """
    n_bytes = sum(sizes.values()) + _ALIGNED * len(sizes)
    memory = getattr(_local, "memory", None)
    if memory is None or memory.numel() < n_bytes:
        memory = torch.empty(n_bytes, dtype=torch.uint8)
        _local.memory = memory if n_bytes <= MOST_HELD else None
    places, at = {}, memory.data_ptr()
    for name, size in sizes.items():
        places[name] = at = -(-at // _ALIGNED) * _ALIGNED
        at += size
    return memory, places
