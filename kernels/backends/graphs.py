"""Work on a GPU that is the same at every call, recorded once: a launch instead of dozens."""

import gc
import logging
import os
import threading
from collections.abc import Callable

import torch

WARM = 2  # calls before it is worth recording; they compile kernels
GRAPHS = os.environ.get("SAAP_CUDA_GRAPHS", "1") != "0"

_log = logging.getLogger(__name__)


class _Pools(threading.local):
    """Where recorded work keeps what it makes on the way, for each stream of a thread.

    Pieces of work that run one after another can share it: nothing of theirs outlives its run.
    """

    def __init__(self):
        self.of_stream: dict[tuple[torch.device, int], tuple[tuple[int, int], object]] = {}

    def of(self, stream: torch.cuda.Stream) -> tuple[int, int]:
        """Made within the stream that captures."""
        key = stream.device, stream.cuda_stream
        if key not in self.of_stream:
            # A pool goes with the last graph that uses it, and cannot be used again: one stays.
            handle, keeper = torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
            keeper.capture_begin(pool=handle, capture_error_mode="thread_local")
            torch.zeros(1, device=stream.device, dtype=torch.float32)
            keeper.capture_end()
            self.of_stream[key] = handle, keeper
        return self.of_stream[key][0]


_pools = _Pools()


def replayed(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """`work`, which on a GPU is a `Replayed` one."""
    return Replayed(work, device) if device.type == "cuda" else work


class Replayed:
    """Calls `work`, which reads and writes the same tensors every time and returns nothing.

    After some calls as they are, it is captured as a CUDA graph and replayed. `work` must neither
    wait for the GPU nor depend on values that the host knows, and must not hold on to this object:
    a graph that only the garbage collector finds may go while another one is captured, which ends
    the capture. Calls of another stream or thread than those that it was captured in run as they
    are, and so do those within another capture, and all where capturing fails, or with
    `SAAP_CUDA_GRAPHS=0`.
    """

    def __init__(self, work: Callable[[], None], device: torch.device):
        self._work, self._device, self._calls = work, device, 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._of: tuple[int, int] | None = None

    def __call__(self) -> None:
        with torch.cuda.device(self._device):
            self._run()

    def _run(self) -> None:
        stream = torch.cuda.current_stream()
        own = threading.get_ident(), stream.cuda_stream
        if self._graph is not None and self._of == own:
            self._graph.replay()
            return
        self._calls += 1
        busy = not GRAPHS or self._of is not None or torch.cuda.is_current_stream_capturing()
        if self._calls <= WARM or busy:
            self._work()
            return
        self._of = own  # captured once, or never
        self._graph = self._captured(stream)
        if self._graph is None:
            self._work()
        else:
            self._graph.replay()

    def _captured(self, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph | None:
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(stream.device)
        collects = gc.isenabled()
        gc.disable()
        try:
            side.wait_stream(stream)
            with torch.cuda.stream(side):
                pool = _pools.of(stream)
                # Other threads may use the GPU meanwhile.
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    self._work()
                finally:
                    graph.capture_end()
            stream.wait_stream(side)
        except RuntimeError as failure:
            _log.warning("a step runs without a CUDA graph, which could not be made: %s", failure)
            return None
        finally:
            if collects:
                gc.enable()
        return graph
