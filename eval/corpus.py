"""Text files in, sequences of token ids out."""

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


def read_corpus(paths: list[Path]) -> bytes:
    """All text of the files, and of the text files in folders, in path order."""
    texts = []
    for path in paths:
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES and p.is_file())
        elif path.is_file():
            files = [path]
        else:
            raise ValueError(
                f"{path}: no such file or folder; accepted are text files and folders"
            )
        texts += [file.read_bytes() for file in files]
    text = b"\n".join(texts)
    if not text.strip():
        names = ", ".join(map(str, paths))
        raise ValueError(
            f"{names}: the corpus is empty; accepted is at least a few contexts of text"
        )
    return text


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
