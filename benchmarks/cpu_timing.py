"""Times on a machine that others use too: everything that is compared takes turns."""

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import numpy as np
import torch
from torch import Tensor

Call = Callable[[], object]

MIN_ROUNDS, MAX_ROUNDS = 7, 40


def take_turns(passes: Mapping[str, Sequence[Call]], seconds: float) -> dict[str, list[float]]:
    """Milliseconds a call of each pass in each round: A B C, C B A, A B C, ...

    What slows the machine down for a while then slows neighbours in a round alike: compare times
    of one round, and take the median of those ratios. One round before them is not counted.
    """
    spent: dict[str, list[float]] = {name: [] for name in passes}
    order = list(passes)
    begin = time.perf_counter()
    for done in range(-1, MAX_ROUNDS):
        for name in order:
            start = time.perf_counter()
            for call in passes[name]:
                call()
            ms = 1e3 * (time.perf_counter() - start) / len(passes[name])
            if done >= 0:
                spent[name].append(ms)
        order.reverse()
        if done + 1 >= MIN_ROUNDS and time.perf_counter() - begin > seconds:
            break
    return spent


class Reader:
    """A plain read of memory on as many threads as torch uses: the limit of the other figures."""

    PARTS_PER_THREAD = 8

    def __init__(self):
        self.threads = torch.get_num_threads()
        self.pool = ThreadPoolExecutor(self.threads)

    def read(self, *tensors: Tensor) -> int:
        """Reads each contiguous tensor once; the value keeps LLVM from dropping the reads."""
        parts = []
        for tensor in tensors:
            words = tensor.view(-1).view(torch.int64).numpy()
            parts += np.array_split(words, self.threads * self.PARTS_PER_THREAD)
        return sum(self.pool.map(_sum, parts))


@numba.njit("int64(int64[::1])", nogil=True, cache=True)
def _sum(words):
    total = np.int64(0)
    for word in words:
        total += word
    return total


def fastest_read_gbps(reader: Reader, tensor: Tensor) -> dict[str, float]:
    """GB/s of three ways to read a large tensor, each at its best of several turns."""
    ways = {
        "sum of int64": [lambda: reader.read(tensor)],
        "torch.sum": [lambda: tensor.sum()],
        "torch.max": [lambda: tensor.max()],
    }
    spent = take_turns(ways, seconds=3)
    return {name: tensor.nbytes / min(ms) / 1e6 for name, ms in spent.items()}


def cold_bytes() -> int:
    """Bytes that a pass should read so that no cache holds them: four times the last level's."""
    caches = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [int(path.read_text().strip().removesuffix("K")) * 1024 for path in caches]
    return max(2**28, 4 * max(sizes, default=0))


def load() -> float:
    """Processes that wanted a core, mean of the last minute."""
    return round(os.getloadavg()[0], 2)


def paired_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median over the rounds of `above / below`."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))
