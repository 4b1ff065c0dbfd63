"""Text in, sequences of token ids out. Text comes from files, folders, JSON lines or datasets."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch

from .tasks.answering import encode

TEXT_SUFFIXES = {
    ".txt",
    ".py",
    ".md",
    ".rst",
    ".json",
    ".jsonl",
    ".c",
    ".h",
    ".cpp",
    ".js",
    ".html",
}
BYTES_A_TOKEN = 16  # more than any tokenizer needs: how much of a dataset is read
DATASET_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+){0,2}")


def read_corpus(
    paths: list[Path], *, text_field: str = "text", enough: int | None = None
) -> bytes:
    """All text of the files, and of the text files in folders, in path order.

    A `.jsonl` file gives `text_field` of each line. A folder that `datasets` saved, and a name
    `NAME[:CONFIG[:SPLIT]]` that is no path, are read with that library, if it is installed: the
    first `enough` bytes or all. Raises ValueError for what cannot be read, ImportError without
    `datasets`.
    """
    texts: list[bytes] = []
    for path in paths:
        if is_saved_dataset(path) or not path.exists():
            texts += read_dataset(path, text_field, enough)
            continue
        files = [path]
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES and p.is_file())
        for file in files:
            texts += json_lines(file, text_field) if file.suffix == ".jsonl" else [read_file(file)]
    text = b"\n".join(texts)
    if not text.strip():
        names = ", ".join(map(str, paths))
        raise ValueError(
            f"{names}: the corpus is empty; accepted is at least a few contexts of text"
        )
    return text


def read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error


def json_lines(path: Path, field: str) -> list[bytes]:
    """`field` of each line. ValueError names the first line that has none."""
    found = []
    for number, line in enumerate(read_file(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        found.append(text_of(entry, field, f"{path}, line {number}"))
    return found


def text_of(entry, field: str, where: str) -> bytes:
    text = entry.get(field) if isinstance(entry, dict) else None
    if not isinstance(text, str):
        fields = ", ".join(map(str, entry)) if isinstance(entry, dict) else type(entry).__name__
        raise ValueError(
            f"{where}: no text under {field!r}, but {fields}; --text-field names the one to take"
        )
    return text.encode("utf-8", errors="ignore")


def is_saved_dataset(path: Path) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` made this folder."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def read_dataset(path: Path, field: str, enough: int | None) -> list[bytes]:
    """Texts of a Hugging Face dataset: a saved folder, or `NAME[:CONFIG[:SPLIT]]`."""
    name = str(path)
    accepted = "accepted are text files, folders, .jsonl files and names of Hugging Face datasets"
    if not path.exists() and (
        not DATASET_NAME.fullmatch(name) or Path(name.split(":")[0]).suffix in TEXT_SUFFIXES
    ):
        raise ValueError(f"{name}: no such file or folder; {accepted}")
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{name}: no such file or folder; to read it as a Hugging Face dataset: "
            "pip install datasets"
            if not path.exists()
            else f"{name}: a saved Hugging Face dataset; to read it: pip install datasets"
        ) from error
    try:
        rows = open_dataset(datasets, path)
        return first_texts(rows, field, name, enough)
    except ValueError:
        raise
    except Exception as error:  # the library has dozens of kinds: network, hub, formats
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{name}: cannot be read as a dataset ({line}); {accepted}") from error


def open_dataset(datasets, path: Path) -> Iterable[dict]:
    if path.exists():
        found = datasets.load_from_disk(str(path))
        if not isinstance(found, dict):
            return found
        return found["train"] if "train" in found else next(iter(found.values()))
    name, config, split = (*str(path).split(":"), None, None)[:3]
    return datasets.load_dataset(name, config, split=split or "train", streaming=True)


def first_texts(rows: Iterable[dict], field: str, name: str, enough: int | None) -> list[bytes]:
    found, size = [], 0
    for number, row in enumerate(rows):
        found.append(text_of(row, field, f"{name}, row {number}"))
        size += len(found[-1])
        if enough is not None and size >= enough:
            break
    return found


def sequences(tokenizer, text: bytes, length: int, count: int) -> list[torch.Tensor]:
    """Up to `count` pieces of `length` tokens, evenly spread over the text, without overlap."""
    first = encode(tokenizer, text[: min(len(text), 200_000)])
    bytes_a_token = min(len(text), 200_000) / max(1, len(first))
    size = int(length * bytes_a_token * 1.1) + 8
    available = max(1, len(text) // size)
    step = len(text) / min(count, available)
    found = []
    for number in range(min(count, available)):
        start = int(number * step)
        found.append(encode(tokenizer, text[start : start + size])[:length])
    return found
