"""What the command line shows: progress with time left, tables, one-line errors."""

from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from .report import COLUMNS, cell, table_rows

console = Console()
errors = Console(stderr=True)


@contextmanager
def progress_bars():
    """Yields `report(what, done, total)`: one bar for each different `what`."""
    columns = (
        TextColumn("{task.description:<34.34}"),
        BarColumn(bar_width=28),
        TaskProgressColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    with Progress(*columns, console=console, transient=False) as bars:
        tasks: dict[str, int] = {}

        def report(what: str, done: int, total: int) -> None:
            # "routers (loss 3.21)" keeps one bar while the number in it changes.
            stem = what.split(" (")[0]
            if stem not in tasks:
                tasks[stem] = bars.add_task(what, total=total)
            bars.update(tasks[stem], description=what, completed=done, total=total)

        yield report


@contextmanager
def one_bar(what: str):
    """Yields `report(what_now, done, total)` for a single bar."""
    with progress_bars() as report:
        yield lambda now, done, total: report(f"{what} ({now})", done, total)


def print_scores(scores: list[dict], context: int, budget: str) -> None:
    table = Table(
        title=f"{context:,} tokens, {float(budget):.0%} of the cache",
        title_justify="left",
        title_style="bold",
        header_style="dim",
        box=None,
        padding=(0, 1, 0, 0),
    )
    accuracy = {
        s["method"]: s["accuracy"]
        for s in scores
        if s["task"] == "passkey" and s["context"] == context and s["budget"] == budget
    }
    for key, _, title, _ in COLUMNS:
        table.add_column(title, justify="left" if key == "method" else "right", no_wrap=True)
    if accuracy:
        table.add_column("keys", justify="right", no_wrap=True)
    for row in table_rows(scores, context, budget):
        cells = [cell(row.get(key), form) for key, _, _, form in COLUMNS]
        if accuracy:
            cells.append(cell(accuracy.get(row["method"]), "{:.0%}"))
        table.add_row(*cells, style="bold" if row["method"] == "saap" else None)
    console.print(table)
    console.print(
        "[dim]recall: attention mass of the middle that is found; of all: sinks and window too; "
        "oracle: share of the oracle's; error: of the output; worst: the worst far-looking head; "
        "kB: read a layer and step, with the router; keys: pass keys answered[/]"
    )
