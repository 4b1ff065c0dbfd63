"""Kernels of Triton with all their arguments: whoever plans them need not run them."""

import contextlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]


def launch_all(work: Iterable[Launch], like: Tensor) -> None:
    """Runs them, one after the other, on the device of `like`."""
    with torch.cuda.device_of(like) if like.is_cuda else contextlib.nullcontext():
        for launch in work:
            launch.kernel[launch.grid](**launch.arguments, **launch.options)
