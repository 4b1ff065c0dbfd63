"""What objects look like at a prompt and in a notebook: a line, and a small table."""

import html
from collections.abc import Sequence

Facts = Sequence[tuple[str, object]]


def line(name: str, facts: Facts) -> str:
    """`Name(fact: value, ...)`."""
    return f"{name}({', '.join(f'{what}: {value}' for what, value in facts)})"


def table(name: str, facts: Facts) -> str:
    """The same as an HTML table of two columns."""
    return rows_table(name, (), [[what, str(value)] for what, value in facts])


def rows_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; the first column is text, the others are numbers."""

    def row(cells: Sequence[str], tag: str) -> str:
        first = f'<{tag} style="text-align:left">{html.escape(cells[0])}</{tag}>'
        others = (
            f'<{tag} style="text-align:right">{html.escape(cell)}</{tag}>' for cell in cells[1:]
        )
        return f"<tr>{first}{''.join(others)}</tr>"

    top = f"<thead>{row(head, 'th')}</thead>" if head else ""
    body = "".join(row(cells, "td") for cells in rows)
    caption = f'<caption style="text-align:left"><b>{html.escape(title)}</b></caption>'
    return f"<table>{caption}{top}<tbody>{body}</tbody></table>"


def size(nbytes: float) -> str:
    """`1.5 MB`, in powers of ten."""
    for unit in ("bytes", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:,.0f} bytes" if unit == "bytes" else f"{nbytes:,.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:,.1f} GB"
