"""Work on a GPU that is the same at every call, recorded once: a launch instead of dozens."""

import threading
from collections.abc import Callable

import torch

WARM = 2  # calls before it is worth recording; they compile kernels


class _Pools(threading.local):
    """Where recorded work keeps what it makes on the way, for each stream of a thread.

    Pieces of work that run one after another can share it: nothing of theirs outlives its run.
    """

    def __init__(self):
        self.of_stream: dict[tuple[torch.device, int], tuple[int, int]] = {}

    def of(self, stream: torch.cuda.Stream) -> tuple[int, int]:
        key = stream.device, stream.cuda_stream
        if key not in self.of_stream:
            self.of_stream[key] = torch.cuda.graph_pool_handle()
        return self.of_stream[key]


_pools = _Pools()


class Replayed:
    """Calls `work`, which reads and writes the same tensors every time and returns nothing.

    After some calls as they are, it is captured as a CUDA graph and replayed. `work` must neither
    wait for the GPU nor depend on values that the host knows. Calls of another stream than the one
    that it was captured on run as they are, and so do those within another capture.
    """

    def __init__(self, work: Callable[[], None]):
        self._work, self._calls = work, 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._of: tuple[int, int] | None = None

    def __call__(self) -> None:
        stream = torch.cuda.current_stream()
        own = threading.get_ident(), stream.cuda_stream
        if self._graph is not None and self._of == own:
            self._graph.replay()
            return
        recorded = self._graph is not None
        if recorded or self._calls < WARM or torch.cuda.is_current_stream_capturing():
            self._calls += 1
            self._work()
            return
        self._graph, self._of = self._capture(stream), own
        self._graph.replay()

    def _capture(self, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(stream.device)
        side.wait_stream(stream)
        with torch.cuda.stream(side):
            # Other threads may use the GPU meanwhile.
            graph.capture_begin(pool=_pools.of(stream), capture_error_mode="thread_local")
            try:
                self._work()
            finally:
                graph.capture_end()
        stream.wait_stream(side)
        return graph
