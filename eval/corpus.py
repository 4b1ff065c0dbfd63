"""Text in, sequences of token ids out. Text comes from files, folders, JSON lines or datasets."""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch

from .corpora import CORPORA, read_named
from .html_text import decode, html_to_text
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
    ".java",
    ".go",
    ".rs",
    ".ts",
    ".sh",
    ".tex",
}
HTML_SUFFIXES = {".html", ".htm", ".xhtml"}
BEGINNING, UTF_16 = 8192, (b"\xff\xfe", b"\xfe\xff")
BYTES_A_TOKEN = 16  # more than any tokenizer needs: how much of a dataset is read
DATASET_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+){0,2}")


def read_corpus(
    paths: list[Path], *, text_field: str = "text", enough: int | None = None
) -> bytes:
    """All text of the files, and of the text files in folders, in path order, each text once.

    Pages of HTML give what one reads in them. A `.jsonl` file gives `text_field` of each line. A
    name in `corpora.CORPORA` that is no path gives that corpus. A folder that `datasets` saved,
    and a name `NAME[:CONFIG[:SPLIT]]` that is no path, are read with that library, if it is
    installed: the first `enough` bytes or all. Raises ValueError for what cannot be read,
    ImportError without `datasets`.
    """
    texts: list[bytes] = []
    for path in paths:
        if not path.exists() and str(path) in CORPORA:
            texts += read_named(str(path))
        elif is_saved_dataset(path) or not path.exists():
            texts += read_dataset(path, text_field, enough)
        elif path.is_dir():
            texts += read_folder(path, text_field=text_field)
        else:
            texts += read_texts(path, text_field)
    text = b"\n".join(distinct(texts))
    if not text.strip():
        names = ", ".join(map(str, paths))
        raise ValueError(f"{names}: must hold text; got none")
    return text


def read_folder(
    folder: Path,
    suffixes: Iterable[str] = (*TEXT_SUFFIXES, *HTML_SUFFIXES),
    skipped: frozenset[str] = frozenset(),
    *,
    text_field: str = "text",
) -> list[bytes]:
    """The texts of a folder's files in path order. `skipped`: names of files and folders in it."""
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in suffixes
        and path.is_file()
        and skipped.isdisjoint(path.relative_to(folder).parts)
    )
    return [text for file in files for text in read_texts(file, text_field)]


def read_texts(file: Path, text_field: str) -> list[bytes]:
    """What a file holds, as UTF-8."""
    if file.suffix == ".jsonl":
        return json_lines(file, text_field)
    content = read_file(file)
    if b"\0" in content[:BEGINNING] and not content.startswith(UTF_16):
        raise ValueError(f"{file}: must be text; got bytes that are none")
    if file.suffix.lower() in HTML_SUFFIXES:
        return [html_to_text(content)]
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return [decode(content).encode()]
    return [content]


def distinct(texts: Iterable[bytes]) -> list[bytes]:
    """Each text where it came first: copies of a file say nothing new."""
    found: dict[bytes, bytes] = {}
    for text in texts:
        found.setdefault(hashlib.sha256(text).digest(), text)
    return list(found.values())


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
            raise ValueError(
                f"{path}, line {number}: must be JSON; got another text ({error})"
            ) from error
        found.append(text_of(entry, field, f"{path}, line {number}"))
    return found


def text_of(entry, field: str, where: str) -> bytes:
    text = entry.get(field) if isinstance(entry, dict) else None
    if not isinstance(text, str):
        fields = ", ".join(map(str, entry)) if isinstance(entry, dict) else type(entry).__name__
        raise ValueError(
            f"{where}: must hold text under {field!r}; got {fields}: --text-field names the one "
            "to take"
        )
    return text.encode("utf-8", errors="ignore")


def is_saved_dataset(path: Path) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` made this folder."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def read_dataset(path: Path, field: str, enough: int | None) -> list[bytes]:
    """Texts of a Hugging Face dataset: a saved folder, or `NAME[:CONFIG[:SPLIT]]`."""
    name = str(path)
    wanted = "must be a text file, a folder, a .jsonl file or the name of a Hugging Face dataset"
    if not path.exists() and (
        not DATASET_NAME.fullmatch(name) or Path(name.split(":")[0]).suffix in TEXT_SUFFIXES
    ):
        raise ValueError(f"{name}: {wanted}; got no such file or folder")
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
        raise ValueError(f"{name}: {wanted}; got one that cannot be read ({line})") from error


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
    """Up to `count` pieces of `length` tokens, evenly spread over the text, without overlap.

    Raises ValueError for a text that is shorter than one piece.
    """
    first = encode(tokenizer, text[: min(len(text), 200_000)])
    bytes_a_token = min(len(text), 200_000) / max(1, len(first))
    size = int(length * bytes_a_token * 1.1) + 8
    if len(text) < size:
        total = len(first) if len(text) <= 200_000 else len(encode(tokenizer, text))
        if total < length:
            raise ValueError(
                f"corpus: must have at least the {length} tokens of one text; got {total}: bring "
                "more text, or lower the context"
            )
    available = max(1, len(text) // size)
    step = len(text) / min(count, available)
    found = []
    for number in range(min(count, available)):
        start = int(number * step)
        found.append(encode(tokenizer, text[start : start + size])[:length])
    return found
