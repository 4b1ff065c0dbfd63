"""What a command is to write, checked before it reads or computes anything."""

import os
from collections.abc import Iterable
from pathlib import Path

from ..records import RECORDS, RUN

# What `saap eval` writes into its folder.
RESULTS = (RUN, RECORDS, "scores.json", "scores.csv", "report.html")


def check_output(out: Path, inputs: Iterable[Path | str | None]) -> None:
    """Raise ValueError when `out` cannot be written, or is what the command reads.

    `inputs`: files, folders, and names that are neither. Of a folder, `out` may replace what saap
    wrote there before, and nothing else.
    """
    from saap.index.atomic_files import check_writable

    for source in existing(inputs):
        if source.is_file() and out.exists() and out.samefile(source):
            raise ValueError(f"--out must be another file than the input {source}; got {out}")
        inside = out.resolve().is_relative_to(source.resolve())
        if source.is_dir() and inside and out.is_file() and not is_ours(out):
            raise ValueError(
                f"--out must be another file than those of the input {source}; got {out}"
            )
    check_writable(out)


def check_output_folder(out: Path, inputs: Iterable[Path | str | None]) -> None:
    """The same for the folder of an evaluation, which may hold its index but no text."""
    from saap.index.atomic_files import check_writable

    check_writable(out / RECORDS)
    for source in existing(inputs):
        name = source.name
        ours = name in RESULTS or source.suffix == ".png"
        if source.is_file() and ours and out.is_dir() and out.samefile(source.parent):
            raise ValueError(
                f"--out must be another folder than that of {source}, whose name results have; "
                f"got {out}"
            )
        if source.is_dir() and out.exists() and out.samefile(source):
            raise ValueError(f"--out must be another folder than the input {source}; got {out}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder or a new name; got the file {out}")


def existing(names: Iterable[Path | str | None]) -> list[Path]:
    return [Path(name) for name in names if name is not None and os.path.exists(name)]


def is_ours(path: Path) -> bool:
    """Whether saap wrote this file: an index or a context."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return any(key.startswith("saap.") for key in file.metadata() or {})
    except (SafetensorError, OSError):
        return False
