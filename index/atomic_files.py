"""Files that are written whole or not at all."""

import contextlib
import glob
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows: leftovers of killed processes stay
    fcntl = None


def write_atomically(path: Path, content: bytes | Callable[[str], object]) -> None:
    """Write `content` to `path` as a whole; on an error, `path` stays as it was.

    `content`: bytes, or a function that writes to the temporary path that it is given. An existing
    file keeps its mode, a link stays a link, and leftovers of killed processes that wrote this
    file are removed. Raises ValueError when the file cannot be written.
    """
    check_replaceable(path)
    temporary = handle = None
    try:
        target = Path(path).resolve()
        remove_leftovers(target)
        handle, temporary = _locked_file(target)
        if target.exists():
            os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))
        if isinstance(content, bytes):
            Path(temporary).write_bytes(content)
        else:
            content(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: cannot be written ({reason})") from error
    finally:
        if handle is not None:
            os.close(handle)
            Path(temporary).unlink(missing_ok=True)


def check_replaceable(path: Path) -> None:
    """Raise ValueError for a folder and for a device, which a new file would replace."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: must be a file or a new name; got a folder or a device")


def check_writable(path: Path) -> None:
    """Raise ValueError when `write_atomically` could not write this file now: before the work.

    Permissions alone do not tell, so a file is made and removed. A folder that is missing yet is
    as writable as the nearest one above it.
    """
    try:
        check_replaceable(path)
        target = Path(path).resolve()
        nearest = next(folder for folder in target.parents if folder.exists())
        handle, temporary = _locked_file(nearest / target.name)
        os.close(handle)
        os.unlink(temporary)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror})") from error


def remove_leftovers(target: Path) -> None:
    """Remove unfinished writes of this file by processes that are gone: they hold no lock."""
    if fcntl is None:
        return
    for name in glob.glob(f".{glob.escape(target.name)}.????????.part", root_dir=target.parent):
        with contextlib.suppress(OSError):
            handle = os.open(target.parent / name, os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(target.parent / name)
            finally:
                os.close(handle)


def _locked_file(target: Path) -> tuple[int, str]:
    """A new file beside `target`, with the mode that new files get, and locked."""
    while True:
        temporary = target.parent / f".{target.name}.{secrets.token_hex(4)}.part"
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if fcntl is None:
            return handle, str(temporary)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        # Without a link, it was taken for a leftover and removed before it was locked.
        if os.fstat(handle).st_nlink:
            return handle, str(temporary)
        os.close(handle)
