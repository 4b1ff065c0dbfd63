"""Source text that every machine with Python has: the standard library, split by file.

Files whose path hashes into the held-out share never reach training, under any Python version.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
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


def read_sources(root: Path | None = None, *, held_out: bool) -> Iterator[bytes]:
    """The text of each file of one side of the split, in path order, duplicates dropped."""
    root = root or Path(sysconfig.get_path("stdlib"))
    seen = set()
    for path in source_files(root):
        if is_held_out(path.relative_to(root).as_posix()) != held_out:
            continue
        text = path.read_bytes()
        digest = hashlib.sha1(text, usedforsecurity=False).digest()
        if len(text) < 200 or digest in seen:
            continue
        seen.add(digest)
        yield text
