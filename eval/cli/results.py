"""The commands that read result folders: `saap report`, `saap compare`. Neither needs a model."""

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command()(report)
    app.command()(compare)


def report(
    folder: Annotated[Path, typer.Argument(help="folder that `saap eval` wrote")],
    strict: Annotated[
        bool, typer.Option("--strict", help="exit code 1 when a result is suspicious")
    ] = False,
) -> None:
    """Score a result folder again and make its report; needs neither model nor index."""
    from ..checks import check_folder
    from ..report.page import make_report
    from .terminal import print_suspicions, say

    say(f"{make_report(folder)}\n")
    found = check_folder(folder)
    print_suspicions(found)
    if found and strict:
        raise typer.Exit(1)


def compare(
    a: Annotated[Path, typer.Argument(help="result folder of the run before")],
    b: Annotated[Path, typer.Argument(help="result folder of the run after")],
    level: Annotated[float, typer.Option(help="level of the bootstrap's intervals")] = 0.99,
    everything: Annotated[
        bool, typer.Option("--all", help="also show what did not change beyond noise")
    ] = False,
) -> None:
    """Show what changed between two runs, and whether it is more than noise.

    Exit code 0: nothing is worse. 1: something is worse beyond noise. 2: bad input.
    """
    from ..compare import compare as compare_folders
    from .terminal import print_comparison

    found = compare_folders(a, b, level=level)
    print_comparison(found, level, everything)
    if found.worse:
        raise typer.Exit(1)
