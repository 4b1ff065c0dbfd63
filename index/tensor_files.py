"""Safetensors files with a signed header: written whole or not at all, checked when opened.

The metadata holds a JSON header: the format's version, what the file is about, shape, dtype and
SHA-256 of each tensor, and its own SHA-256. `read` checks the header and what it says of shapes,
and maps the tensors, whose pages are copied when they are written; `verify` reads all of them.
There is no pickle in these files.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .atomic_files import check_replaceable, write_atomically

__all__ = ["Format", "check_replaceable", "fingerprint", "read", "verify", "write",
           "write_atomically"]  # fmt: skip

SAFETENSORS_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8",
}  # fmt: skip
UNKNOWN = "0" * 64  # as long as a digest


@dataclass(frozen=True)
class Format:
    """A kind of file: its key in the metadata, its version, and what makes such files."""

    kind: str
    version: int
    maker: str


def write(path: str | Path, kind: Format, header: dict, tensors: dict[str, Tensor]) -> None:
    """Write header and tensors, piece by piece, without a copy of strided views as a whole.

    A file of that name stays until the new one is complete. Raises ValueError when it cannot be
    written.
    """
    # As safetensors does it: the widest elements first, so that all are aligned.
    tensors = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    table = {name: {**shape_and_dtype(t), "sha256": UNKNOWN} for name, t in tensors.items()}
    own = {"format_version": kind.version, "tensors": table, "sha256": UNKNOWN}
    header = json.loads(json.dumps(header)) | own
    places, end = {}, 0
    for name, t in tensors.items():
        places[name] = {
            "dtype": SAFETENSORS_DTYPES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [end, end + t.nbytes],
        }
        end += t.nbytes

    def head() -> bytes:
        metadata = {kind.kind: json.dumps(header, sort_keys=True)}
        text = json.dumps({"__metadata__": metadata, **places}).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def write_to(temporary: str) -> None:
        with open(temporary, "wb") as file:
            file.write(head())
            for name, t in tensors.items():
                digest = described(t)
                for piece in pieces(t):
                    digest.update(piece)
                    file.write(piece)
                table[name]["sha256"] = digest.hexdigest()
            header["sha256"] = header_digest(header)
            file.seek(0)
            file.write(head())  # the digests are known now; they are as long as UNKNOWN

    write_atomically(Path(path), write_to)


def read(path: str | Path, kind: Format) -> tuple[dict, dict[str, Tensor]]:
    """The checked header and the mapped tensors of a file of this format.

    Raises ValueError for any other file, an older version, one cut short, an altered header, and
    shapes that are not those of the header.
    """
    path = Path(path)
    if not path.is_file():
        got = "a folder" if path.is_dir() else "no such file"
        raise ValueError(f"{path}: must be a file that {kind.maker} wrote; got {got}")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(kind.kind, "null"))
            # Not a dict: a file has keys() and no iteration.
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, TypeError, RecursionError, OSError) as error:
        reason = type(error).__name__ if isinstance(error, RecursionError) else error
        raise ValueError(
            f"{path}: must be a whole safetensors file; got a truncated or another one ({reason})"
        ) from error
    if not isinstance(header, dict):
        raise ValueError(
            f"{path}: must be a file that {kind.maker} wrote; got another safetensors file"
        )
    if header.get("format_version") != kind.version:
        raise ValueError(
            f"{path}: its format version must be {kind.version}; got "
            f"{header.get('format_version')!r:.40}: make it again with {kind.maker}"
        )
    if header.get("sha256") != header_digest(header):
        raise ValueError(
            f"{path}: its header must fit its checksum; got another: the file was altered"
        )
    check_table(path, header, tensors)
    return header, tensors


def check_table(path: Path, header: dict, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError when shapes or types are not those of the header's table `tensors`."""
    table = header.get("tensors")
    table = table if isinstance(table, dict) else {}
    for name in {**table, **tensors}:
        entry = table.get(name)
        digest = entry.get("sha256") if isinstance(entry, dict) else None
        found = shape_and_dtype(tensors[name]) if name in tensors else None
        if found is None or entry != {**found, "sha256": digest} or not isinstance(digest, str):
            raise ValueError(f"{path}: {name} must be as its header says, {entry}; got {found}")


def verify(
    path: str | Path,
    header: dict,
    tensors: dict[str, Tensor],
    progress: Callable[[str], None] = lambda name: None,
) -> None:
    """Read all tensors; a ValueError names the first one that has changed."""
    for name, tensor in tensors.items():
        progress(name)
        if tensor_digest(tensor) != header["tensors"][name]["sha256"]:
            raise ValueError(
                f"{path}: {name} must fit its checksum; got another: the file was altered"
            )


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """A digest of names, shapes and contents of tensors."""
    digests = {name: tensor_digest(t) for name, t in tensors.items()}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    digest = described(tensor)
    for piece in pieces(tensor):
        digest.update(piece)
    return digest.hexdigest()


def described(tensor: Tensor):
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())


def pieces(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor in row-major order, without a copy of the whole."""
    if tensor.numel() == 0:
        return
    if tensor.is_contiguous() or tensor.ndim <= 1:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        yield memoryview(flat.view(torch.uint8).numpy())
    else:
        for part in tensor:
            yield from pieces(part)


def header_digest(header: dict) -> str:
    signed = {name: value for name, value in header.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(signed, sort_keys=True).encode()).hexdigest()


def shape_and_dtype(tensor: Tensor) -> dict:
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype)}
