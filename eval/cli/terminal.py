"""What the command line shows: tables and one-line errors."""

import functools
import os
import sys

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..compare import Change, Comparison
from ..report.page import COLUMNS, at_budget, cell, table_rows
from ..report.tables import ANSWER_HEAD, SPEED_HEAD, answer_rows, speed_rows
from ..units import share_of


class Terminal(Console):
    """A console whose reader may go, as `head` does: the command goes on, for its exit code."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


console = Terminal()
errors = Terminal(stderr=True)


def say(text: str) -> None:
    """Write plain text to standard output at once."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        console.on_broken_pipe()


def print_scores(scores: list[dict], context: int, budget: str) -> None:
    table = Table(
        title=f"{context:,} tokens, {100 * float(budget):.3g}% of the cache",
        title_justify="left",
        title_style="bold",
        header_style="dim",
        box=None,
        padding=(0, 1, 0, 0),
    )
    accuracy = {
        s["method"]: s["accuracy"]
        for s in scores
        if s["task"] == "passkey"
        and s["context"] == context
        and share_of(s["budget"]) == float(budget)
    }
    # With answers there is no room for all in 80 columns.
    shown = [c for c in COLUMNS if not (accuracy and c[0] == "recall_all")]
    for key, _, title, _ in shown:
        method = key == "method"
        table.add_column(
            title, justify="left" if method else "right", no_wrap=not method, overflow="fold"
        )
    if accuracy:
        table.add_column("keys", justify="right", no_wrap=True)
    for row in table_rows(scores, context, budget):
        cells = [cell(row.get(key), form) for key, _, _, form in shown]
        if accuracy:
            cells.append(cell(accuracy.get(row["method"]), "{:.0%}"))
        cells = map(escape, cells)  # variants are named in brackets, which rich takes for markup
        table.add_row(*cells, style="bold" if row["method"] == "saap" else None)
    console.print(table)
    of_all = "" if accuracy else "; of all: sinks and window too"
    answers = "; keys: pass keys answered" if accuracy else ""
    console.print(
        f"[dim]recall: attention mass of the middle that is found{of_all}; "
        "oracle: share of the oracle's; needles: lost of what rows of 5 % of a head's attention "
        "or more hold; error: of the output; worst: the worst far-looking head; kB: read per "
        f"layer and step, with the router{answers}[/]"
    )


def plain_table(title: str, head: tuple[str, ...], rows: list[list[str]]) -> None:
    table = Table(
        title=title, title_justify="left", title_style="bold", header_style="dim", box=None,
        padding=(0, 1, 0, 0),
    )  # fmt: skip
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row), style="bold" if row[0] == "saap" else None)
    console.print(table)


def print_against_dense(scores: list[dict]) -> None:
    """Tasks judged by answers or nats, but pass keys, which the main table holds."""
    for context, rows in answer_rows([s for s in scores if s["task"] != "passkey"]).items():
        plain_table(f"against dense, {context:,} tokens", ANSWER_HEAD, rows)


def print_speed(scores: list[dict], budget: str) -> None:
    for context, rows in speed_rows(at_budget(scores, budget)).items():
        title = (
            f"µs per layer and step, {context:,} tokens, {100 * float(budget):.3g}% of the cache"
        )
        shorter = (SPEED_HEAD[0], *SPEED_HEAD[2:])
        plain_table(title, shorter, [[row[0], *row[2:]] for row in rows])


VERDICT_STYLES = {"worse": "bold red", "better": "green", "unclear": "yellow", "told": "dim"}


def print_comparison(found: Comparison, level: float, everything: bool) -> None:
    """Changes beyond noise first; with `everything`, all others too."""
    for line in found.settings:
        console.print(f"[dim]{escape(line)}[/]", highlight=False)
    print_suspicions(found.incomplete)
    alone = {"only in the first": found.only_a, "only in the second": found.only_b}
    for name, places in alone.items():
        if places:
            listed = sorted({f"{task} {method}" for task, _, method, _ in places})
            console.print(f"[yellow]{name}[/]: {escape(', '.join(listed))}", highlight=False)
    order = ("worse", "better", "unclear", "told", "same")
    hidden = () if everything else ("same", "told")
    rows = [c for c in found.changes if c.verdict not in hidden]
    if rows:
        table = Table(header_style="dim", box=None, padding=(0, 1, 0, 0))
        for title in ("", "result", "metric"):
            table.add_column(title, overflow="fold")
        for title in ("before", "after", "difference"):
            table.add_column(title, justify="right", overflow="fold")
        for change in sorted(rows, key=lambda c: (order.index(c.verdict), c.place)):
            table.add_row(*comparison_cells(change), style=VERDICT_STYLES.get(change.verdict))
        console.print(table)
    counts = {name: sum(c.verdict == name for c in found.changes) for name in order}
    names = ("worse", "better", "without change beyond noise", "with too few texts to say")
    told = zip(names, (counts[k] for k in ("worse", "better", "same", "unclear")), strict=True)
    console.print(
        f"{len(found.changes)} results compared: "
        + ", ".join(f"{n} {name}" for name, n in told if n)
        + (f", {counts['told']} times not judged" if counts["told"] else "")
        + f". [dim]{level:.0%} intervals of a paired bootstrap over texts and prompts[/]",
        highlight=False,
    )


def comparison_cells(change: Change) -> list[str]:
    task, context, method, budget = change.place
    form, interval = change.metric.form, change.interval
    bounds = ""
    if interval.low is not None and change.verdict != "told":
        bounds = f" [{signed(form, interval.low)}, {signed(form, interval.high)}]"
    return [
        change.verdict,
        escape(f"{method}, {task} {context:,}, {budget}"),
        change.metric.title,
        form.format(change.before),
        form.format(change.after),
        escape(signed(form, change.after - change.before) + bounds),
    ]


def signed(form: str, value: float) -> str:
    return form.replace("{:", "{:+").format(value)


def print_suspicions(found: list[str]) -> None:
    for line in found:
        errors.print(f"[yellow]suspicious[/]: {escape(line)}", highlight=False)


def print_warning(line: str) -> None:
    errors.print(f"[yellow]warning[/]: {escape(line)}", highlight=False)


@functools.cache
def tell_licence(name: str) -> None:
    """Once, what a model that comes as a package is, and its licence; raises if it is missing."""
    from saap.hf.packaged import PACKAGED, find_packaged

    if name in PACKAGED:
        find_packaged(name)
        model = PACKAGED[name]
        errors.print(f"[dim]{name}: {model.title} ({model.licence})[/]", highlight=False)
