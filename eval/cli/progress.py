"""Progress of long work, with time left: bars on a terminal, now and then a line in a log.

Both go to standard error, so that what a command prints can be piped.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from .terminal import errors

Report = Callable[[str, int, int], None]

LINE_SECONDS = 20.0
"""Between two lines of a log, and before the first one: what is done sooner needs none."""


@contextmanager
def progress_bars() -> Iterator[Report]:
    """Yields `report(what, done, total)`: one bar, or lines of its own, for each different `what`.

    "routers (loss 3.21)" stays the same work while the number in it changes.
    """
    with _bars() if errors.is_terminal else _lines() as report:
        yield report


@contextmanager
def one_bar(what: str) -> Iterator[Report]:
    """Yields `report(what_now, done, total)` for a single bar."""
    with progress_bars() as report:
        yield lambda now, done, total: report(f"{what} ({now})", done, total)


@contextmanager
def _bars() -> Iterator[Report]:
    columns = (
        TextColumn("{task.description:<34.34}"),
        BarColumn(bar_width=28),
        TaskProgressColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    # Units of work take from seconds to minutes: time left is told from all of them so far.
    bars = Progress(*columns, console=errors, speed_estimate_period=3600)
    tasks: dict[str, int] = {}

    def report(what: str, done: int, total: int) -> None:
        bars.start()  # only now: what is refused before ends in one line, without an empty bar
        stem = what.split(" (")[0]
        if stem not in tasks:
            tasks[stem] = bars.add_task(what, total=total)
        bars.update(tasks[stem], description=what, completed=done, total=total)

    try:
        yield report
    finally:
        if tasks:
            bars.stop()


@contextmanager
def _lines() -> Iterator[Report]:
    began: dict[str, float] = {}
    told: dict[str, float] = {}

    def report(what: str, done: int, total: int) -> None:
        now, stem = time.monotonic(), what.split(" (")[0]
        first = began.setdefault(stem, now)
        last = told.get(stem)
        finished = done >= total
        if now - (first if last is None else last) < LINE_SECONDS and not (finished and last):
            return
        told[stem] = now
        spent = now - first
        left = "" if finished or not done else f", {duration(spent * (total - done) / done)} left"
        share = 100 * done // max(total, 1)
        line = f"{what}: {share}%, {duration(spent)}{left}"
        errors.print(line, highlight=False, markup=False, soft_wrap=True)

    yield report


def duration(seconds: float) -> str:
    """As a bar tells it: `1:05`, `2:00:00`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
