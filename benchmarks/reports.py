"""Where results go: JSON under `$OUT`, else under `benchmarks/results/<device>/`; scores of runs
on several machines, each of which is told with its run, under `benchmarks/results/`.

And the tables of pages in `docs/` that are made from it.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def report_path(device: str, name: str) -> Path:
    """The file of this name for results of a device; its folder is there."""
    return _held(RESULTS / slug(device)) / name


def scores_path(name: str) -> Path:
    """The file of this name for scores of runs; its folder is there."""
    return _held(RESULTS) / name


def _held(folder: Path) -> Path:
    folder = Path(os.environ.get("OUT") or folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write(path: Path, report: dict[str, Any]) -> None:
    path.write_text(json.dumps(report, indent=1) + "\n")


def put_table(page: Path, command: str, table: str) -> None:
    """Between the page's lines `<!-- table: command -->` and `<!-- end: command -->`.

    Results that go to `$OUT` are somebody's own and change no page.
    """
    if "OUT" in os.environ:
        return
    begin, end = f"<!-- table: {command} -->", f"<!-- end: {command} -->"
    text = page.read_text()
    before, after = text.split(begin)[0], text.split(end)[1]
    page.write_text(f"{before}{begin}\n{table}\n{end}{after}")


def markdown(head: list[str], rows: list[list[str]], n_texts: int = 1) -> str:
    """`n_texts`: so many columns, from the first one on, hold words; the others numbers."""
    lines = [head, ["---"] * n_texts + ["---:"] * (len(head) - n_texts), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(value: Any, form: str, factor: float = 1.0) -> str:
    if value is None:
        return "–"
    return form.format(factor * value if isinstance(value, float) else value)
