"""Source text that machines with Python have: the standard library and installed packages.

It is split by file: files whose path hashes into the held-out share never reach training, under
any version of Python or of a package.
"""

import hashlib
import importlib.metadata
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_SHARE = 20  # one file in 20
# Tables and generated data: text that repeats itself trivially and teaches nothing.
SKIPPED_FOLDERS = {
    "encodings",
    "site-packages",
    "__pycache__",
    "dist-packages",
    "config-3.11-x86_64-linux-gnu",
}
SUFFIXES = {".py", ".rst", ".txt"}
STDLIB = "stdlib"
PACKAGES = {
    "numpy": "numpy",
    "torch": "torch",
    "scikit-learn": "sklearn",
    "transformers": "transformers",
}
"""Folders of the distributions that may be trained on, all under permissive licences."""


@dataclass(frozen=True)
class Source:
    """A tree of text files. `key` goes before a file's path where it is hashed."""

    name: str
    version: str
    licence: str
    root: Path
    key: str = ""


def find_sources(names: tuple[str, ...]) -> tuple[list[Source], list[str]]:
    """The sources that this machine has, and the names of those it lacks.

    Raises ValueError for a name that is neither "stdlib" nor in PACKAGES.
    """
    found, missing = [], []
    for name in names:
        if name == STDLIB:
            root = Path(sysconfig.get_path("stdlib"))
            found.append(Source(name, sysconfig.get_python_version(), "PSF-2.0", root))
            continue
        if name not in PACKAGES:
            raise ValueError(
                f"source must be one of {STDLIB}, {', '.join(PACKAGES)}; got {name!r}"
            )
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            continue
        folder = PACKAGES[name]
        root = Path(str(package.locate_file(folder)))
        found.append(Source(name, package.version, licence_of(package), root, f"{folder}/"))
    return found, missing


def licence_of(package: importlib.metadata.Distribution) -> str:
    fields = package.metadata
    stated = fields.get("License-Expression") or fields.get("License") or "see its metadata"
    return stated.splitlines()[0]


def is_held_out(relative_path: str) -> bool:
    digest = hashlib.sha1(relative_path.encode(), usedforsecurity=False).digest()
    return digest[0] % HELD_OUT_SHARE == 0


def source_files(root: Path) -> list[Path]:
    return sorted(
        path
        for path in root.rglob("*")
        if path.suffix in SUFFIXES
        and path.is_file()
        and not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
    )


def read_sources(root: Path | None = None, *, held_out: bool, key: str = "") -> Iterator[bytes]:
    """The text of each file of one side of the split, in path order, duplicates dropped.

    `root`: the standard library when None.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    seen = set()
    for path in source_files(root):
        if is_held_out(key + path.relative_to(root).as_posix()) != held_out:
            continue
        text = path.read_bytes()
        digest = hashlib.sha1(text, usedforsecurity=False).digest()
        if len(text) < 200 or digest in seen:
            continue
        seen.add(digest)
        yield text


def training_text(sources: list[Source], *, drop_copies: bool) -> bytes:
    """All files to train on; `drop_copies`: without those that some held-out file repeats."""
    held_out = set()
    if drop_copies:
        held_out = {
            hashlib.sha1(text, usedforsecurity=False).digest()
            for source in sources
            for text in read_sources(source.root, held_out=True, key=source.key)
        }
    return b"\n".join(
        text
        for source in sources
        for text in read_sources(source.root, held_out=False, key=source.key)
        if not held_out or hashlib.sha1(text, usedforsecurity=False).digest() not in held_out
    )
