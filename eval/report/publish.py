"""Put a demo's plot and table into the docs.

`python -m saap.eval.report.publish RESULTS ROOT`, with the folder of results and the checkout.
Figures of `docs/start.md` are made by this script, between its two marker lines.
"""

import shutil
import sys
from pathlib import Path

from ..scores import read_scores
from .page import COLUMNS, cell, headline, main_budget, make_report, table_rows

BEGIN, END = "<!-- results: python -m saap.eval.report.publish -->", "<!-- end of results -->"


def markdown(scores: list[dict]) -> str:
    """The headline and the main table of the longest context."""
    budget = main_budget(scores)
    context = max(s["context"] for s in scores if s["task"] == "attention")
    answers = {
        s["method"]: s["accuracy"]
        for s in scores
        if s["task"] == "passkey" and s["context"] == context
    }
    asked = ["pass keys"] if answers else []
    lines = [
        headline(scores).replace("<p class=lead>", "").replace("</p>", "").replace("<b>", "**")
        .replace("</b>", "**"),
        "",
        "| " + " | ".join([*(title for _, title, _, _ in COLUMNS), *asked]) + " |",
        "|" + "---|" * (len(COLUMNS) + len(asked)),
    ]  # fmt: skip
    for row in table_rows(scores, context, budget):
        cells = [cell(row.get(key), form) for key, _, _, form in COLUMNS]
        cells += [cell(answers.get(row["method"]), "{:.0%}") for _ in asked]
        mark = "**" if row["method"] == "saap" else ""
        lines.append("| " + " | ".join(f"{mark}{c}{mark}" for c in cells) + " |")
    return "\n".join(lines)


def publish(results: Path, root: Path) -> None:
    """Rewrite the marked part of `root/docs/start.md` and copy the plots to `root/docs`."""
    make_report(results)
    page = root / "docs" / "start.md"
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page}: must hold lines {BEGIN!r} and {END!r}; got none")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    table = markdown(read_scores(results))
    page.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")
    for name in ("recall", "heads"):
        shutil.copyfile(results / f"{name}.png", root / "docs" / f"{name}.png")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python -m saap.eval.report.publish RESULTS ROOT")
    publish(Path(sys.argv[1]), Path(sys.argv[2]))
