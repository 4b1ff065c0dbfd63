"""The beginning of a GGUF file, read and checked before hundreds of MB are read.

This reader is our own, because libraries answer damaged files with all kinds of exceptions.
"""

import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9
MOST_DIMENSIONS, MOST_BYTES_OF_A_NAME = 4, 1 << 16


@dataclass(frozen=True)
class TensorInfo:
    shape: tuple[int, ...]  # as torch writes it: what varies fastest comes last
    kind: int  # the number of a ggml type
    offset: int  # from `Header.data_start`


@dataclass(frozen=True)
class Header:
    """Metadata and the list of tensors. Arrays are not kept: their value is their length."""

    path: Path
    metadata: dict
    tensors: dict[str, TensorInfo]
    data_start: int

    @property
    def architecture(self) -> str:
        return self.metadata["general.architecture"]

    @property
    def licence(self) -> str | None:
        return self.metadata.get("general.license")

    @cached_property
    def own(self) -> dict:
        """The architecture's own keys, without its name."""
        prefix = f"{self.architecture}."
        return {k[len(prefix) :]: v for k, v in self.metadata.items() if k.startswith(prefix)}

    def end(self, sizes: dict) -> int:
        """Bytes that the file has to have. `sizes`: values and bytes of a block, by ggml type."""
        return self.data_start + max(
            t.offset + self._size(n, sizes) for n, t in self.tensors.items()
        )

    def _size(self, name: str, sizes: dict) -> int:
        found, n = self.tensors[name], 1
        for width in found.shape:
            n *= width
        if found.kind not in sizes:
            raise ValueError(
                f"{self.path}: the type of {name} must be one that the gguf package knows; "
                f"got {found.kind}"
            )
        values, nbytes = sizes[found.kind]
        return n // values * nbytes


class Cursor:
    """Reads from a place on; ValueError at the end of the file and for absurd lengths."""

    def __init__(self, path: Path):
        self.path, self.size = path, path.stat().st_size
        self.stream = path.open("rb")

    def take(self, n: int) -> bytes:
        found = self.stream.read(n) if n <= self.size else b""
        if len(found) < n:
            raise ValueError(
                f"{self.path}: a GGUF file must hold what its beginning announces; got "
                f"{self.size:,} bytes (truncated or damaged: copy it again)"
            )
        return found

    def number(self, code: str):
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int):
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise ValueError(
                f"{self.path}: a value's type must be a number from 0 to 12; got {kind} (damaged)"
            )
        element, n = self.number("I"), self.number("Q")
        if element in SCALARS:
            self.take(n * struct.calcsize(f"<{SCALARS[element]}"))
        elif element == STRING:
            for _ in range(n):
                self.take(self.number("Q"))
        else:
            raise ValueError(
                f"{self.path}: an array must be of numbers or texts; got type {element} (damaged)"
            )
        return n


def is_gguf(source: str | Path) -> bool:
    """Whether the name is that of a GGUF file; nothing is read."""
    return str(source).lower().endswith(".gguf") and not Path(source).is_dir()


def read_header(path: str | Path) -> Header:
    """Metadata and tensors of a GGUF file. ValueError for other or damaged files."""
    path = Path(path)
    try:
        cursor = Cursor(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    with cursor.stream:
        magic = cursor.stream.read(4)
        if magic != MAGIC:
            raise ValueError(f"{path}: a GGUF file must begin with {MAGIC!r}; got {magic!r}")
        version = cursor.number("I")
        if version not in VERSIONS:
            versions = " or ".join(map(str, VERSIONS))
            raise ValueError(f"{path}: GGUF version must be {versions}; got {version}")
        n_tensors, n_values = cursor.number("Q"), cursor.number("Q")
        metadata = {}
        for _ in range(n_values):
            name = cursor.text()
            metadata[name] = cursor.value(cursor.number("I"))
        tensors = dict(tensor(cursor) for _ in range(n_tensors))
        end = cursor.stream.tell()
    if not isinstance(metadata.get("general.architecture"), str) or not tensors:
        raise ValueError(
            f"{path}: a model must have general.architecture and tensors; got "
            f"{metadata.get('general.architecture')!r} and {len(tensors)} tensors"
        )
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"{path}: general.alignment must be 1 or more; got {alignment!r}")
    return Header(path, metadata, tensors, -(-end // alignment) * alignment)


def tensor(cursor: Cursor) -> tuple[str, TensorInfo]:
    name, n = cursor.text(), cursor.number("I")
    if n > MOST_DIMENSIONS or len(name) > MOST_BYTES_OF_A_NAME:
        raise ValueError(
            f"{cursor.path}: a tensor must have at most {MOST_DIMENSIONS} dimensions; got {n} "
            "(damaged)"
        )
    shape = tuple(reversed([cursor.number("Q") for _ in range(n)]))
    return name, TensorInfo(shape, cursor.number("I"), cursor.number("Q"))
