"""What mkdocs asks while it builds: the page of commands is made from the commands themselves."""

import typer

MARK = "<!-- commands -->"


def on_page_markdown(markdown: str, **_) -> str:
    """The page with all commands in the place of its mark."""
    return markdown.replace(MARK, commands_page()) if MARK in markdown else markdown


def commands() -> dict:
    """Every command that `saap --help` lists, by name."""
    from saap.eval.cli.app import app

    found = typer.main.get_command(app).commands
    return {name: command for name, command in found.items() if not command.hidden}


def commands_page() -> str:
    return "\n\n".join(section(name, command) for name, command in commands().items())


def section(name: str, command) -> str:
    """One command in Markdown: what it does, how it is called, every argument and option."""
    given = [p for p in command.params if p.name != "help"]
    arguments = [p.name.upper() for p in given if p.param_type_name == "argument"]
    lines = [
        f"## saap {name}", "", " ".join((command.help or "").split()), "",
        f"```\n{' '.join(['saap', name, *arguments])} [OPTIONS]\n```", "",
    ]  # fmt: skip
    if given:
        lines += ["| | default | meaning |", "|---|---|---|"]
    for parameter in given:
        if parameter.param_type_name == "argument":
            called = parameter.name.upper()
        else:
            called = " / ".join([*parameter.opts, *parameter.secondary_opts])
        meaning = (getattr(parameter, "help", "") or "").replace("|", "\\|")
        lines.append(f"| `{called}` | {default_of(parameter)} | {meaning} |")
    return "\n".join(lines)


def default_of(parameter) -> str:
    if parameter.required:
        return "required"
    if parameter.default in (None, "", ()) or callable(parameter.default):
        return ""
    return "off" if parameter.default is False else f"`{parameter.default}`"
