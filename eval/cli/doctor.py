"""The command `saap doctor`: what is installed, what will be used, and whether it is right."""

import typer


def register(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor() -> None:
    """Show what is installed and what will be used; test the kernels and a long context."""
    from .. import doctor as examined
    from .terminal import console, plain_table

    findings = examined.installed()
    rows = [[f.name, f.state, f.use] for f in findings]
    plain_table("what was found", ("", "found", "used for"), rows)
    missing = [f for f in findings if f.install]
    if missing:
        console.print()
        rows = [[f.name, f.install] for f in missing]
        plain_table("what is missing, and the command that brings it", ("", "command"), rows)
    console.print()
    failed = 0
    for test in examined.TESTS:
        with console.status(test.__doc__.splitlines()[0]):
            check = examined.run(test)
        failed += not check.right
        mark = "[green]right[/]" if check.right else "[bold red]wrong[/]"
        console.print(f"{mark}  {check.name}: ", end="", highlight=False)
        console.print(check.told, highlight=False, markup=False)
    needed = [f.name for f in findings if f.needed and f.install]
    if needed:
        console.print(f"[bold red]missing[/]  saap needs {', '.join(needed)}", highlight=False)
    raise typer.Exit(1 if failed or needed else 0)
