"""How many bytes of tensors an object holds, whatever it is made of."""

import dataclasses
from collections.abc import Iterator

from torch import Tensor

from saap.methods.base import Method
from saap.trained_index import TrainedIndex

_SHARED = (Method, TrainedIndex)
"""Belongs to a whole model: not counted for each layer's store."""


def held_bytes(thing: object, *, besides: list[Tensor]) -> int:
    """Bytes of all memory that tensors in `thing` use, each once, but not that of `besides`."""
    sizes = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in _tensors(thing, set())
    }
    for tensor in besides:
        sizes.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def _tensors(thing: object, seen: set[int]) -> Iterator[Tensor]:
    if id(thing) in seen or isinstance(thing, _SHARED):
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from _tensors(value, seen)
    elif isinstance(thing, list | tuple | set):
        for value in thing:
            yield from _tensors(value, seen)
    elif dataclasses.is_dataclass(thing) or type(thing).__module__.startswith("saap"):
        yield from _tensors(getattr(thing, "__dict__", {}), seen)
