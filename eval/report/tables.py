"""Tables beside the main one: answers and text against dense, speed; and CSV."""

import csv
import html
import io

from ..units import share_of, told_search


def named(score: dict) -> str:
    return f"{score['method']} {told_search(score['budget'])}".strip()


def html_table(title: str, note: str, head: tuple[str, ...], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    header = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    body = "".join(
        "<tr{}>{}</tr>".format(
            " class=ours" if row[0] == "saap" else "",
            "".join(f"<td>{html.escape(c)}</td>" for c in row),
        )
        for row in rows
    )
    return (
        f"<h2>{html.escape(title)}</h2><p class=note>{html.escape(note)}</p>"
        f"<div class=scroll><table><thead><tr>{header}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def with_bounds(score: dict, form: str) -> str:
    """`-12% [-20%, -4%]`; a difference whose interval excludes 0 ends in a star."""
    found = score.get("to_dense")
    if found is None:
        return "–"
    value, low, high = found
    text = form.format(value)
    if low is None:
        return f"{text} (too few to say)"
    star = " *" if low > 0 or high < 0 else ""
    return f"{text} [{form.format(low)}, {form.format(high)}]{star}"


ANSWER_HEAD = (
    "method", "task", "score", "minus dense", "nats from dense", "visited", "budget",
)  # fmt: skip
# What a task is judged by, and the forms of it and of its difference to dense.
JUDGED = (
    ("accuracy", "{:.0%}", "{:+.0%}"),
    ("nll", "{:.3f} nats", "{:+.3f}"),
    ("accepted_per_verification", "{:.2f} tokens", "{:+.2f}"),
)
SPEED_HEAD = ("method", "budget", "route", "select", "attend", "other", "step", "dense",
              "speed-up", "build ms", "break-even")  # fmt: skip


def budget_cell(score: dict) -> str:
    share = share_of(score["budget"])
    return "–" if share is None else f"{share:.1%}"


def by_context(scores: list[dict]) -> dict[int, list[dict]]:
    contexts = sorted({s["context"] for s in scores}, reverse=True)
    return {c: [s for s in scores if s["context"] == c] for c in contexts}


def answer_rows(scores: list[dict]) -> dict[int, list[list[str]]]:
    """Rows by context for all tasks that are judged by answers, nats or accepted drafts. Dense
    attention, the same at every budget, has one row for each task."""
    asked = [s for s in scores if any(s.get(name) is not None for name, *_ in JUDGED)]
    rows = {}
    for context, own in by_context(asked).items():
        rows[context] = []
        for s in own:
            exact = s["method"] == "dense"
            if exact and any(row[:2] == [named(s), s["task"]] for row in rows[context]):
                continue
            name, form, change = next(j for j in JUDGED if s.get(j[0]) is not None)
            score, difference = form.format(s[name]), with_bounds(s, change)
            nats = None if exact else s.get("divergence")
            far, visited = "–" if nats is None else f"{nats:.4f}", f"{s['selectivity']:.1%}"
            budget = "–" if exact else budget_cell(s)
            rows[context].append([named(s), s["task"], score, difference, far, visited, budget])
    return rows


def speed_rows(scores: list[dict]) -> dict[int, list[list[str]]]:
    parts = ("route", "select", "attend", "other", "step", "dense")
    return {
        context: [
            [
                named(s),
                budget_cell(s),
                *(f"{s[f'{p}_us']:,.0f}" for p in parts),
                f"{s['speedup']:.2f}x",
                f"{s['build_ms']:,.1f}",
                "never" if s["break_even_tokens"] is None else f"{s['break_even_tokens']:,.0f}",
            ]
            for s in own
        ]
        for context, own in by_context([s for s in scores if s["task"] == "speed"]).items()
    }


def answer_section(scores: list[dict]) -> str:
    return "".join(
        html_table(
            f"Against dense attention, {context:,} tokens",
            "The context is dense, question and answer are sparse. drafting: tokens that one "
            "dense verification gives where the method drafts 8. Difference with a 95 % "
            "interval of a paired bootstrap over prompts or texts; * excludes 0. Nats from dense: "
            "KL divergence of the next token's distribution from that of dense attention.",
            ANSWER_HEAD,
            rows,
        )
        for context, rows in answer_rows(scores).items()
    )


def speed_section(scores: list[dict]) -> str:
    own = [s for s in scores if s["task"] == "speed"]
    load = max((s["load"] for s in own), default=0.0)
    return "".join(
        html_table(
            f"Speed, {context:,} tokens",
            "Microseconds per layer and step, medians; dense is packed SDPA, taking turns. Build: "
            "indexing this context, per layer. Break-even: tokens until the build is paid for. "
            f"{load:.1f} processes wanted a core while this ran.",
            SPEED_HEAD,
            rows,
        )
        for context, rows in speed_rows(own).items()
    )


def csv_text(scores: list[dict]) -> str:
    """All scores that are single values, one row each."""
    columns = list(dict.fromkeys(k for s in scores for k, v in s.items() if is_single(v)))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(scores)
    return out.getvalue()


def is_single(value) -> bool:
    return not isinstance(value, list | dict)
