"""Which implementation scores cells and selects lists: Numba's on a CPU, else the caller's torch
code."""

import functools
import importlib
import importlib.util
from types import ModuleType

import torch


def backend(device: torch.device) -> ModuleType | None:
    """`saap.kernels.routing.numba` for tensors on a CPU, where Numba is installed."""
    return _numba() if device.type == "cpu" else None


@functools.cache
def _numba() -> ModuleType | None:
    if importlib.util.find_spec("numba") is None:
        return None
    return importlib.import_module("saap.kernels.routing.numba")
