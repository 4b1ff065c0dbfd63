"""Context files: a document's KV caches in one safetensors file, mapped when it is opened.

The metadata holds a JSON header: format version, what the caches belong to, shape and SHA-256 of
each tensor, and its own SHA-256. `read` checks the header, the shapes and the length of the file,
and maps the tensors: keys are read as they are visited, and what is written to them stays in
memory. `verify` reads all. Nothing in the format is executed.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from saap.index import tensor_files

FORMAT = "saap.Context"
FORMAT_VERSION = 1
SAFETENSORS_DTYPES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32",
}  # fmt: skip


def write(path: str | Path, header: dict, tensors: dict[str, Tensor]) -> None:
    """Write all, piece by piece: strided views are not copied as a whole.

    A file of that name stays until the new one is complete. Raises ValueError when it cannot be
    written.
    """
    table = {
        name: {**tensor_files.shape_and_dtype(t), "sha256": "0" * 64}
        for name, t in tensors.items()
    }
    header = {"format_version": FORMAT_VERSION, **header, "tensors": table, "sha256": "0" * 64}
    places, end = {}, 0
    for name, t in tensors.items():
        size = t.numel() * t.element_size()
        places[name] = {
            "dtype": SAFETENSORS_DTYPES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [end, end + size],
        }
        end += size

    def head() -> bytes:
        metadata = {FORMAT: json.dumps(header, sort_keys=True)}
        text = json.dumps({"__metadata__": metadata, **places}).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def write_to(temporary: str) -> None:
        with open(temporary, "wb") as file:
            file.write(head())
            for name, t in tensors.items():
                digest = _described(t)
                for piece in pieces(t):
                    digest.update(piece)
                    file.write(piece)
                table[name]["sha256"] = digest.hexdigest()
            header["sha256"] = tensor_files.header_digest(header)
            file.seek(0)
            file.write(head())  # digests are known now, and as long as what stood for them

    tensor_files.write_atomically(Path(path), write_to)


def pieces(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor in row-major order, without a copy of the whole."""
    if tensor.numel() == 0:
        return
    if tensor.is_contiguous() or tensor.ndim == 1:
        yield memoryview(tensor.cpu().contiguous().view(torch.uint8).numpy().reshape(-1))
    else:
        for part in tensor:
            yield from pieces(part)


def read(path: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """The checked header and the mapped tensors. Raises ValueError for any other file."""
    path = Path(path)
    header, tensors = tensor_files.read(path, FORMAT, FORMAT_VERSION, "`saap index`")
    tensor_files.check_signed(path, header)
    tensor_files.check_table(path, header, tensors)
    return header, tensors


def verify(path: str | Path, progress: Callable[[str], None] = lambda name: None) -> None:
    """Read a whole file; ValueError names the first tensor that is not as it was saved."""
    header, tensors = read(path)
    for name, tensor in tensors.items():
        progress(name)
        digest = _described(tensor)
        for piece in pieces(tensor):
            digest.update(piece)
        if digest.hexdigest() != header["tensors"][name]["sha256"]:
            raise ValueError(f"{path}: {name} does not fit its checksum: the file was altered")


def _described(tensor: Tensor):
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
