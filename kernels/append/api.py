"""One row for each sequence and head, written behind the others; numbers of rows count it.

A step writes a few hundred bytes, for which each of PyTorch's operators takes as long as a kernel
of `saap` takes for all of it: on a CPU one call does everything.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Int32, Shaped
from torch import Tensor

from saap.kernels import backends
from saap.kernels.backends.prepared import Preparation

from . import reference


class PreparedAppend(Preparation):
    """Writes rows into the same buffers again and again, and counts them.

    Args:
        buffers: a row's elements lie beside each other. Without any it only counts.
        counts: numbers that each call adds 1 to; any strides.

    Raises ValueError for other tensors.
    """

    def __init__(
        self,
        buffers: Sequence[Shaped[Tensor, "B H capacity width"]],
        counts: Sequence[Int32[Tensor, "n heads"]],
    ):
        _check(buffers, counts)
        self._tensors = tuple(buffers), tuple(counts)
        self._write = None
        on_cpu = all(t.device.type == "cpu" for t in (*buffers, *counts))
        if on_cpu and backends.installed("numba"):
            from .numba import Prepared

            self._write = Prepared(*self._tensors)

    def __call__(
        self, rows: Sequence[Shaped[Tensor, "B H 1 width"]], places: Sequence[int]
    ) -> None:
        """`rows`: of each buffer's dtype and device. `places`: the row of each sequence, within
        the capacity; none without buffers. The caller answers for both."""
        if self._write is None or not self._write(rows, places):
            reference.append(*self._tensors, rows, places)


def _check(buffers, counts) -> None:
    for buffer in buffers:
        if buffer.ndim != 4 or buffer.shape[:3] != buffers[0].shape[:3] or buffer.stride(3) != 1:
            raise ValueError(
                "buffers must be [B, H, capacity, width], alike but for the width, a row's "
                f"elements beside each other; got {tuple(buffer.shape)} with strides "
                f"{buffer.stride()}"
            )
    for own in counts:
        if own.ndim != 2 or own.dtype != torch.int32:
            raise ValueError(
                f"counts must be int32 [n, heads]; got {own.dtype} {tuple(own.shape)}"
            )
