"""The rotation of keys and queries before they are coded, on the device where they are."""

import functools

import torch
from torch import Tensor

from saap.kernels.pages import rotation


@functools.cache
def rotation_on(dim: int, scale: float, device: torch.device) -> Tensor:
    """`rotation(dim)` times the scale of the scores, float32 `[D, D]`."""
    return (rotation(dim) * scale).to(device)
