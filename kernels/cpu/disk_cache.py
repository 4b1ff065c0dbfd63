"""Where compiled kernels are kept on disk: with the user, not beside the installed source.

Numba by itself would write into `__pycache__` of the package, which may belong to another user and
which no uninstall tidies up.
"""

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numba

_lock = threading.Lock()


def folder() -> Path | None:
    """$NUMBA_CACHE_DIR, else `saap` in the user's cache folder; None where none can be written."""
    try:
        # The base directory specification: a relative $XDG_CACHE_HOME counts as not set.
        home = Path(os.environ.get("XDG_CACHE_HOME", ""))
        home = home if home.is_absolute() else Path.home() / ".cache"
        path = Path(numba.config.CACHE_DIR or home / "saap")
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()  # permissions alone do not tell
    except (OSError, RuntimeError):  # RuntimeError: the user has no home
        return None
    return path


@contextlib.contextmanager
def in_user_folder() -> Iterator[bool]:
    """Within, `cache=True` of Numba writes to `folder()`; yields whether there is one.

    Numba knows one folder for the whole process, so the setting is put back at the end and other
    libraries keep theirs. The lock keeps two of our own compilations from undoing each other's.
    """
    path = folder()
    if path is None:
        yield False
        return
    with _lock:
        before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(path)
        try:
            yield True
        finally:
            numba.config.CACHE_DIR = before
