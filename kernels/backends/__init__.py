"""Which backend does a call: what the `api.py` of each operation asks.

A backend is a module of an operation's folder, of the name of the package that it needs; beside it
lies `reference.py`, which needs none. An explicit `impl` never falls back.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from types import ModuleType

from torch import Tensor


def chosen(
    operation: str,
    backends: Sequence[str],
    impl: str | None,
    best: str,
    refusal: Callable[[ModuleType], str | None],
) -> ModuleType:
    """The module of `operation`, the name of a package, that does a call.

    `impl`: one of `backends`, or None for `best`, and for the reference where `best` is not
    installed or cannot do the call. `refusal(module)`: why a backend cannot do it, or None.

    Raises ValueError for an unknown `impl`, and for one that is not installed or cannot do it.
    """
    if impl not in (None, *backends):
        raise ValueError(f"impl must be None or one of {', '.join(backends)}; got {impl!r}")
    name = impl or best
    if name == "reference" or (impl is None and not installed(name)):
        return _module(operation, "reference")
    if not installed(name):
        raise ValueError(f"impl {name!r} needs the package {name}; it is not installed")
    backend = _module(operation, name)
    refused = refusal(backend)
    if refused is None:
        return backend
    if impl is None:
        return _module(operation, "reference")
    raise ValueError(refused)


def values_are_checked(tensor: Tensor) -> bool:
    """Whether a call looks at what its tensors hold; on a GPU, which that would wait for, only
    under `SAAP_DEBUG=1`."""
    return tensor.device.type == "cpu" or os.environ.get("SAAP_DEBUG") == "1"


@functools.cache
def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@functools.cache
def _module(operation: str, name: str) -> ModuleType:
    return importlib.import_module(f".{name}", operation)
