"""Device time of calls: CUDA-graph replays over several input sets, so that no cache helps."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Call = Callable[[], object]

MEASURE_S = 0.06


class Timing(NamedTuple):
    """Median milliseconds a call, and whether a replayed graph was timed (else eager calls)."""

    ms: float
    graph: bool


def time_calls(calls: Sequence[Call], device: torch.device) -> Timing:
    """Times one pass over `calls`, each with its own inputs, and divides by their number."""
    if device.type == "cpu":
        begin = time.perf_counter()
        for call in calls:
            call()
        return Timing(1e3 * (time.perf_counter() - begin) / len(calls), False)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except RuntimeError:
        torch.cuda.synchronize()
        return Timing(_median_ms(lambda: [call() for call in calls]) / len(calls), False)
    return Timing(_median_ms(graph.replay) / len(calls), True)


def _median_ms(run: Call) -> float:
    def once() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    once()
    repeats = int(min(max(1e3 * MEASURE_S / max(once(), 1e-3), 5), 200))
    return statistics.median(once() for _ in range(repeats))


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def step_seconds(
    step: Call, device: torch.device, *, warm: int, turns: int, steps: int
) -> list[float]:
    """Of each turn, seconds for one of `steps` eager calls that follow one another, the host's
    work counted in."""
    for _ in range(warm):
        step()
    found = []
    for _ in range(turns):
        wait(device)
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        wait(device)
        found.append((time.perf_counter() - begin) / steps)
    return found


def host_us(call: Call, device: torch.device, repeats: int = 200) -> float:
    """Microseconds that the host spends to enqueue one eager call."""
    repeats = repeats if device.type == "cuda" else 1
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    spent = time.perf_counter() - begin
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e6 * spent / repeats


def copy_gbps(device: torch.device) -> float:
    """Device-to-device copy, bytes read plus bytes written: the limit of the other figures."""
    size = 2**31 if device.type == "cuda" else 2**22
    source = torch.empty(size, dtype=torch.int8, device=device).random_(-128, 127)
    target = torch.empty_like(source)
    ms = min(time_calls([lambda: target.copy_(source)], device).ms for _ in range(3))
    return 2 * size / ms / 1e6


class Pool:
    """One large random k and v, of which every shape of the benchmark is a view.

    A pass of timed calls should read `cold_bytes`, several times what the caches hold.
    """

    def __init__(self, elements: int, device: torch.device, dtype: torch.dtype):
        self.elements = elements
        self.cold_bytes = 4e8 if device.type == "cuda" else 1
        self.k, self.v = (
            torch.empty(elements, device=device, dtype=dtype).normal_() for _ in range(2)
        )

    def holds(self, *shape: int) -> bool:
        return torch.Size(shape).numel() <= self.elements

    def views(self, *shape: int) -> list[tuple[Tensor, Tensor]]:
        """Disjoint stores of that shape, as many as make a pass over them larger than caches."""
        size = torch.Size(shape).numel()
        wanted = max(1, round(self.cold_bytes / (2 * size * self.k.element_size())))
        count = min(wanted, self.elements // size)
        return [
            tuple(x[i * size : (i + 1) * size].view(shape) for x in (self.k, self.v))
            for i in range(count)
        ]
