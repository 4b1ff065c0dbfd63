"""One `saap eval` at a time in a folder: a second one would write every record twice."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nobody is kept out
    fcntl = None

CLAIM = ".saap-eval"


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """While open, no other process claims `folder`; one that was killed keeps no claim.

    Makes the folder, and removes it again when nothing was written. Raises ValueError that names
    the process at work there.
    """
    made = not folder.exists()
    handle = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _locked(folder)
        os.truncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
    except OSError as error:
        if handle is not None:
            os.close(handle)
        raise ValueError(f"{folder}: cannot be written ({error.strerror})") from error
    try:
        yield
    finally:
        (folder / CLAIM).unlink(missing_ok=True)
        os.close(handle)
        if made:
            with contextlib.suppress(OSError):  # it holds results
                folder.rmdir()


def _locked(folder: Path) -> int:
    """The open file of the claim, which the system gives up when this process ends."""
    path = folder / CLAIM
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if fcntl is None:
            return handle
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = os.read(handle, 20).decode(errors="replace").strip() or "unknown"
            os.close(handle)
            raise ValueError(
                f"{folder}: must be used by one `saap eval` at a time; got another one, process "
                f"{other}, at work in it"
            ) from None
        except OSError:  # a file system without locks
            return handle
        if os.fstat(handle).st_nlink:
            return handle
        os.close(handle)  # its owner removed it between our opening and our locking
