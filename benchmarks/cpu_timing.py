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
    """Plain reads of memory on as many threads as torch uses: the limit of the other figures.

    Two ways, since neither is the faster one everywhere; the limit is the faster of a round.
    """

    PARTS_PER_THREAD = 8

    def __init__(self):
        self.threads = torch.get_num_threads()
        self.pool = ThreadPoolExecutor(self.threads)

    def calls(self, stores: Sequence[tuple[Tensor, ...]]) -> dict[str, list[Call]]:
        """For each way a pass that reads all contiguous tensors of each store once."""
        return {
            "read, int64": [lambda store=store: self.add_words(store) for store in stores],
            "read, torch.sum": [
                lambda store=store: [x.view(-1).view(torch.float32).sum() for x in store]
                for store in stores
            ],
        }

    def add_words(self, tensors: Sequence[Tensor]) -> int:
        """Sum of all words; the value keeps LLVM from dropping the reads."""
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
