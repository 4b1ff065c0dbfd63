"""Worker processes for units of work that do not depend on each other.

Every unit is computed with the same number of threads, whatever the number of workers: sums in
another order differ in their last bits, graphs that several threads build differ altogether. So
results do not depend on how many workers there are, nor on when a run was killed.
"""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

# Told in one line to a user, as in this process; all others come with the worker's traceback.
USER_ERRORS = (ValueError, ImportError, MemoryError, FloatingPointError)
# Read by OpenMP (torch, faiss) and BLAS when they are loaded.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Crew:
    """`jobs` processes of `threads` threads each."""

    jobs: int
    threads: int

    def __post_init__(self):
        for name in ("jobs", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")


def crew_for(need: int, jobs: int | None = None, threads: int | None = None) -> Crew:
    """As many workers as cores and memory allow, `need` bytes each; they share the cores.

    How many threads a worker has follows from the machine alone, never from `jobs`.
    """
    cores = usable_cores()
    room = max(1, int(0.8 * total_memory() // need))
    threads = max(1, cores // min(cores, room)) if threads is None else threads
    jobs = min(room, max(1, cores // max(1, threads))) if jobs is None else jobs
    return Crew(jobs, threads)


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def total_memory() -> int:
    """Bytes of memory that this process and its children may use together."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/sys/fs/cgroup/memory.max") as file:
            return min(physical, int(file.read()))
    except (OSError, ValueError):  # no such group, or "max"
        return physical


def results(
    open_bench: Callable[[], Any], work: Callable[[Any, Any], Any], units: list, crew: Crew
) -> Iterator[Any]:
    """`work(open_bench(), unit)` of every unit, in their order; each worker opens its own bench.

    Both functions are found by name in a fresh process. Raises what `work` raised, or
    ChildProcessError when a worker died.
    """
    workers = [Worker(open_bench, work, crew.threads) for _ in range(min(crew.jobs, len(units)))]
    try:
        waiting = iter(enumerate(units))
        for worker in workers:
            worker.give(waiting)
        finished: dict[int, Any] = {}
        for number in range(len(units)):
            while number not in finished:
                busy = {w.pipe: w for w in workers if w.unit is not None}
                for pipe in wait(busy):
                    done, result = busy[pipe].take()
                    finished[done] = result
                    busy[pipe].give(waiting)
            yield finished.pop(number)
    finally:
        for worker in workers:
            worker.stop()


class Worker:
    """One process, which works on one unit at a time."""

    def __init__(self, open_bench, work, threads: int):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.unit: tuple[int, Any] | None = None
        self.process = context.Process(
            target=serve, args=(open_bench, work, theirs), name="saap worker", daemon=True
        )
        own = dict.fromkeys(THREAD_VARIABLES, str(threads))
        with variables(own), without_interrupts():
            self.process.start()
        theirs.close()  # so that the pipe ends when the process does

    def give(self, waiting: Iterator[tuple[int, Any]]) -> None:
        self.unit = next(waiting, None)
        if self.unit is not None:
            try:
                self.pipe.send(self.unit[1])
            except (BrokenPipeError, ConnectionResetError):
                raise self.death() from None

    def take(self) -> tuple[int, Any]:
        """The number of the finished unit and its result."""
        try:
            kind, result = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            raise self.death() from None
        if kind is not None:
            raise kind(result)
        return self.unit[0], result

    def death(self) -> ChildProcessError:
        self.process.join(5)
        code = self.process.exitcode
        how = f"exit code {code}"
        if code is not None and code < 0:
            how = signal.Signals(-code).name
        memory = ", most often for lack of memory" if code == -signal.SIGKILL else ""
        return ChildProcessError(
            f"a worker died ({how}{memory}) at {self.unit[1]}: finished units are kept; run the "
            "same command again to continue, with fewer --jobs where memory is short"
        )

    def stop(self) -> None:
        self.process.terminate()
        self.process.join()
        self.pipe.close()


def serve(open_bench, work, pipe: Connection) -> None:
    """The whole life of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told, and stops its workers
    threading.Thread(target=end_with_parent, daemon=True).start()
    bench = None
    while True:
        try:
            unit = pipe.recv()
        except EOFError:
            return
        try:
            bench = bench or open_bench()
            answer = None, work(bench, unit)
        except Exception as error:
            kind = next((k for k in USER_ERRORS if isinstance(error, k)), RuntimeError)
            told = traceback.format_exc() if kind is RuntimeError else str(error)
            answer = kind, told
        pipe.send(answer)


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


@contextmanager
def without_interrupts():
    """Processes started inside see no Ctrl-C, from their first instruction; we see it after."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def variables(values: dict[str, str]):
    """Environment variables that processes started inside inherit."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
