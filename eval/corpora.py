"""Corpora under names, of what many machines have installed: English prose and program code.

Texts of one domain for training, of another for asking how an index does elsewhere. Nothing is
downloaded; what is not installed is refused by name.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from .source_text import read_sources

DOCUMENTATION = Path("/usr/share/doc")


@dataclass(frozen=True)
class Corpus:
    """`read`: its texts, in an order that is always the same. `needs`: what to install for it."""

    title: str
    needs: str
    read: Callable[[], Iterable[bytes]]


def read_named(name: str) -> list[bytes]:
    """The texts of a corpus in CORPORA. ValueError where what it is made of is not installed."""
    corpus = CORPORA[name]
    texts = list(corpus.read())
    if not texts:
        raise ValueError(
            f"corpus {name}: {corpus.title} must be installed ({corpus.needs}); got nothing"
        )
    return texts


def pages(pattern: str, *, skipped: frozenset[str] = frozenset()) -> Callable[[], list[bytes]]:
    """Reads the pages of the newest folder in DOCUMENTATION that fits `pattern`."""

    def read() -> list[bytes]:
        from .corpus import HTML_SUFFIXES, read_folder

        folders = [f for f in DOCUMENTATION.glob(pattern) if f.is_dir()]
        return read_folder(max(folders, key=version), HTML_SUFFIXES, skipped) if folders else []

    return read


def version(folder: Path) -> tuple[list[int], str]:
    """Sorts postgresql-doc-9 before postgresql-doc-15."""
    digits = "".join(c if c.isdigit() else " " for c in str(folder))
    return [int(part) for part in digits.split()], str(folder)


def standard_library() -> Iterable[bytes]:
    """Without what the shipped held-out text is a part of."""
    return read_sources(held_out=False)


CORPORA = {
    "prose": Corpus(
        "the manual of PostgreSQL", "Debian: postgresql-doc", pages("postgresql-doc-*/html")
    ),
    "prose2": Corpus(
        "the documentation of Python",
        "Debian: python3-doc",
        # Without lists of what the other pages have.
        pages(
            "python3-doc/html",
            skipped=frozenset(
                {
                    "_sources",
                    "_static",
                    "_images",
                    "_downloads",
                    "contents.html",
                    "py-modindex.html",
                }
            )
            | {f"genindex{end}" for end in (".html", "-all.html", "-Symbols.html", "-_.html")}
            | {f"genindex-{letter}.html" for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"},
        ),
    ),
    "code": Corpus("the running Python's standard library", "Python's sources", standard_library),
}
