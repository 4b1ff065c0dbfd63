"""Safetensors files with a JSON header in their metadata: written whole or not at all, and checked
when they are opened. There is no pickle in them."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor


def write_atomically(path: Path, content: bytes | Callable[[str], object]) -> None:
    """All of `content` at `path`, or what was there before.

    `content`: bytes, or what writes to the temporary path that it is given. Raises ValueError when
    the file cannot be written.
    """
    check_replaceable(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror})") from error
    try:
        if isinstance(content, bytes):
            Path(temporary).write_bytes(content)
        else:
            content(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be written ({error})") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def check_replaceable(path: Path) -> None:
    """ValueError for a folder, and for a device, which a new file would take the place of."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: a folder or device: accepted is a file, there or not")


def read(path: Path, kind: str, version: int, writer: str) -> tuple[dict, dict[str, Tensor]]:
    """Header and mapped tensors of a file of format `kind` and that version.

    `writer` is who makes such files. Raises ValueError for any other file and for one cut short.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; accepted is one that {writer} wrote")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(kind, "null"))
            # Not a dict: a file has keys() and no iteration.
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: truncated or not a safetensors file ({error})") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: a safetensors file, but not one that {writer} wrote")
    if header.get("format_version") != version:
        raise ValueError(
            f"{path}: format version {header.get('format_version')}: accepted is {version}"
        )
    return header, tensors


def check_signed(path: Path, header: dict) -> None:
    """ValueError where a header does not fit its own `sha256`."""
    if header.get("sha256") != header_digest(header):
        raise ValueError(f"{path}: its header does not fit its checksum: the file was altered")


def check_table(path: Path, header: dict, tensors: dict[str, Tensor]) -> None:
    """ValueError where shapes or types are not those of the header's table `tensors`."""
    found = {name: shape_and_dtype(t) for name, t in tensors.items()}
    promised = {
        name: {key: entry[key] for key in ("shape", "dtype")}
        for name, entry in header["tensors"].items()
    }
    for name in {**promised, **found}:
        if found.get(name) != promised.get(name):
            raise ValueError(
                f"{path}: {name} is {found.get(name)}: its header says {promised.get(name)}"
            )


def header_digest(header: dict) -> str:
    signed = {name: value for name, value in header.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(signed, sort_keys=True).encode()).hexdigest()


def shape_and_dtype(tensor: Tensor) -> dict:
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype)}
