"""Numba functions as C functions of one address: compiled once, called on torch's threads."""

import ctypes
import functools
import logging
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import torch

from . import disk_cache

log = logging.getLogger(__name__)

C_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_compiled = []  # keeps the machine code alive


def compiled(what: str, signature, entries: Sequence[Callable]) -> list[Callable]:
    """The entries, compiled or from the disk cache; `what` names them in the log."""
    begin = time.perf_counter()
    done, kept = _compile(signature, entries)
    _compiled.extend(done)
    seconds = time.perf_counter() - begin
    if all(c.cache_hits for c in done):
        log.info("CPU %s: loaded in %.1f s", what, seconds)
    elif kept:  # Shown by default: a first call that takes seconds should say why.
        log.warning("CPU %s: compiled in %.1f s, now in the disk cache", what, seconds)
    else:
        log.warning(
            "CPU %s: compiled in %.1f s, and again in the next process: no folder for the disk "
            "cache can be written (NUMBA_CACHE_DIR names one)", what, seconds,
        )  # fmt: skip
    return [C_FUNCTION(c.address) for c in done]


def _compile(signature, entries: Sequence[Callable]) -> tuple[list, bool]:
    """Numba's functions, and whether the disk cache holds them."""
    try:
        with disk_cache.in_user_folder() as found:
            return [numba.cfunc(signature, cache=found)(entry) for entry in entries], found
    except OSError:  # a disk that filled up, a folder that went: the kernel itself needs neither
        return [numba.cfunc(signature)(entry) for entry in entries], False


def stamp_of(folder: Path) -> int:
    """Changes with a kernel's source: Numba's cache sees only the file of the entry itself."""
    sources = sorted([*folder.glob("*.py"), *Path(__file__).parent.glob("*.py")])
    return zlib.crc32(b"".join(source.read_bytes() for source in sources))


def run(work: Callable, address: int, workers: int) -> None:
    """Call `work(address)` on so many threads, and wait for all."""
    if workers == 1:
        work(address)
    else:
        _in_parallel()(work, address, workers)


@functools.cache
def _in_parallel() -> Callable[[Callable, int, int], None]:
    """`run(work, address, workers)`: on torch's OpenMP threads, or Python's where it has none."""
    address = openmp_address()
    if not address:
        pool = ThreadPoolExecutor(thread_name_prefix="saap-kernel")
        return lambda work, address, workers: list(pool.map(work, [address] * workers))
    arguments = C_FUNCTION, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
    gomp_parallel = ctypes.CFUNCTYPE(None, *arguments)(address)
    return lambda work, address, workers: gomp_parallel(work, address, workers, 0)


@functools.cache
def openmp_address() -> int:
    """Of `GOMP_parallel(work, address, workers, 0)`, which calls `work(address)` on so many of
    torch's threads; 0 where torch has no OpenMP.

    A second pool of threads would compete with torch's. The OpenMP runtimes of GNU, LLVM and Intel
    export it on Linux.
    """
    try:
        found = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(found, ctypes.c_void_p).value
