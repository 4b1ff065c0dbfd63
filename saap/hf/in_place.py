"""A method of one object that is another one for a while."""

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def put_in_place(owner: nn.Module, name: str, function: Callable) -> Iterator[None]:
    """While open, `function` is the method `name` of `owner`, and of no other object."""
    before = vars(owner).get(name)
    if getattr(before, "__func__", None) is function:
        before = None  # a copy of an attached model brings this along
    setattr(owner, name, types.MethodType(function, owner))
    try:
        yield
    finally:
        if before is None:
            vars(owner).pop(name, None)
        else:
            setattr(owner, name, before)
