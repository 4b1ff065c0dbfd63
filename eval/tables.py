"""Tables beside the main one: answers and text against dense, speed; and CSV."""

import csv
import html
import io

from .units import share_of, told_search


def named(score: dict) -> str:
    return f"{score['method']} {told_search(score['budget'])}".strip()


def html_table(title: str, note: str, head: list[str], rows: list[list[str]]) -> str:
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


def answer_section(scores: list[dict]) -> str:
    """One table a context for all tasks that are judged by answers or by nats."""
    sections = []
    asked = [s for s in scores if s.get("accuracy") is not None or s.get("nll") is not None]
    for context in sorted({s["context"] for s in asked}, reverse=True):
        rows = []
        for s in (s for s in asked if s["context"] == context):
            accuracy = s.get("accuracy") is not None
            share = share_of(s["budget"])
            rows.append(
                [
                    named(s),
                    s["task"],
                    "–" if share is None else f"{share:.1%}",
                    f"{s['selectivity']:.1%}",
                    f"{s['accuracy']:.0%}" if accuracy else f"{s['nll']:.3f} nats",
                    with_bounds(s, "{:+.0%}" if accuracy else "{:+.3f}"),
                ]
            )
        sections.append(
            html_table(
                f"Against dense attention, {context:,} tokens",
                "The context is dense, question and answer are sparse. Difference with a 95 % "
                "interval of a paired bootstrap over prompts or texts; * excludes 0.",
                ["method", "task", "budget", "visited", "score", "minus dense"],
                rows,
            )
        )
    return "".join(sections)


def speed_section(scores: list[dict]) -> str:
    own = [s for s in scores if s["task"] == "speed"]
    sections = []
    for context in sorted({s["context"] for s in own}, reverse=True):
        here = [s for s in own if s["context"] == context]
        rows = [
            [
                named(s),
                "–" if share_of(s["budget"]) is None else f"{share_of(s['budget']):.1%}",
                *(f"{s[f'{p}_us']:,.0f}" for p in ("route", "select", "attend", "other", "step")),
                f"{s['dense_us']:,.0f}",
                f"{s['speedup']:.2f}x",
                f"{s['build_ms']:,.1f}",
                "never" if s["break_even_tokens"] is None else f"{s['break_even_tokens']:,.0f}",
            ]
            for s in here
        ]
        load = max(s["load"] for s in here)
        sections.append(
            html_table(
                f"Speed, {context:,} tokens",
                "Microseconds a layer-step, medians; dense is packed SDPA, taking turns. Build: "
                "indexing this context, a layer. Break-even: tokens until the build is paid for. "
                f"{load:.1f} processes wanted a core while this ran.",
                ["method", "budget", "route", "select", "attend", "other", "step", "dense",
                 "speed-up", "build ms", "break-even"],
                rows,
            )
        )  # fmt: skip
    return "".join(sections)


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
