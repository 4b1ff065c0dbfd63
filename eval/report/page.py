"""`report.html`: pictures and tables of one result folder in one file that needs nothing else."""

import base64
import html
from pathlib import Path
from string import Template

from saap.index.tensor_files import write_atomically

from ..checks import check_folder
from ..records import read_run
from ..scores import score_run
from ..tasks.needle_rows import LEAST
from ..units import share_of, told_lost, told_search
from . import fronts, pictures, plots
from .captions import CAPTIONS
from .tables import answer_section, csv_text, speed_section

TEMPLATE = Path(__file__).with_name("report.html")
HEAD_METHODS = ["oracle-tokens", "saap", "blend", "pq", "kmeans", "quest"]
COMPARED = ("pq", "kmeans", "quest")
# Key, title, title where room is scarce, format.
COLUMNS = (
    ("method", "method", "method", "{}"),
    ("selectivity", "visited", "visited", "{:.1%}"),
    ("recall_middle", "recall, middle", "recall", "{:.1%}"),
    ("recall_all", "recall, all", "of all", "{:.1%}"),
    ("recall_of_oracle", "of oracle", "oracle", "{:.0%}"),
    ("needles_lost", "needles lost", "needles", "{:.2%}"),
    ("output_error", "output error", "error", "{:.3f}"),
    ("worst_head", "worst head", "worst", "{:.0%}"),
    ("kilobytes", "kB per layer and step", "kB", "{:,.0f}"),
    ("router_kilobytes", "router kB", "router", "{:,.0f}"),
)


def main_budget(scores: list[dict]) -> str:
    """The share nearest to 5 % among those of the attention task, as its label begins."""
    shares = {share_of(s["budget"]) for s in scores if s["task"] == "attention"} - {None}
    shares = shares or {share_of(s["budget"]) for s in scores} - {None} or {0.05}
    return f"{min(shares, key=lambda b: abs(b - 0.05)):g}"


def at_budget(scores: list[dict], budget: str) -> list[dict]:
    """Scores at that share, and those bounded otherwise; searches are told with the method."""
    found = []
    for score in scores:
        if share_of(score["budget"]) not in (float(budget), None):
            continue
        told = told_search(score["budget"])
        label = score["budget"].split()[0] if share_of(score["budget"]) is not None else "–"
        found.append({**score, "method": f"{score['method']} {told}".strip(), "budget": label})
    return found


def table_rows(scores: list[dict], context: int, budget: str) -> list[dict]:
    """Rows of the main table, best first, dense at the top."""
    own = at_budget(
        [s for s in scores if s["task"] == "attention" and s["context"] == context], budget
    )
    rows = [
        {**s, "kilobytes": s["bytes_read"] / 1e3, "router_kilobytes": s["router_bytes"] / 1e3}
        for s in own
    ]
    return sorted(rows, key=lambda r: (r["method"] != "dense", -r["recall_middle"]))


def cell(value, form: str) -> str:
    return "–" if value is None else form.format(value)


def make_plots(scores: list[dict], records: list[dict], folder: Path) -> dict[str, Path]:
    made = {
        **attention_plots([s for s in scores if s["task"] == "attention"], folder),
        **answer_plots([s for s in scores if s.get("accuracy") is not None], folder),
    }
    if any(s["task"] == "speed" for s in scores):
        rows = at_budget(scores, main_budget(scores))
        made["latency"] = pictures.latency(scores, rows, folder / "latency.png")
    heads = [r for r in records if r["task"] == "geometry"]
    if heads:
        context = max(r["context"] for r in heads)
        heads = [r for r in heads if r["context"] == context]
        made["keys_queries"] = pictures.keys_and_queries(heads, folder / "keys_queries.png")
        if "bucket_sizes" in heads[0]:
            made["bucket_sizes"] = pictures.bucket_sizes(heads, folder / "bucket_sizes.png")
    return {name: path for name, path in made.items() if path is not None}


def attention_plots(scores: list[dict], folder: Path) -> dict[str, Path | None]:
    if not scores:
        return {}
    context = max(s["context"] for s in scores)
    own = [s for s in scores if s["context"] == context]
    made = {
        name: fronts.draw_front(own, fronts.FRONTS[name], f"{context:,} tokens",
                                folder / f"{name}.png")
        for name in ("recall", "recall_bytes", "error_bytes")
    }  # fmt: skip
    made["heads"] = plots.head_maps(
        scores, context, main_budget(scores), HEAD_METHODS, folder / "heads.png"
    )
    return made


def answer_plots(scores: list[dict], folder: Path) -> dict[str, Path | None]:
    """Fronts where several budgets were asked at, bars or maps at the one of the table, grids."""
    if not scores:
        return {}
    made: dict[str, Path | None] = {}
    tasks = list(dict.fromkeys(s["task"] for s in scores))
    for task in tasks:
        context = max(s["context"] for s in scores if s["task"] == task)
        own = [s for s in scores if s["task"] == task and s["context"] == context]
        name = f"accuracy-{task}"
        where = f"{task}, {context:,} tokens"
        path = folder / f"{name}.png"
        made[name] = fronts.draw_front(own, fronts.FRONTS["accuracy"], where, path)
    rows = at_budget(scores, answer_budget(scores))
    if tasks == ["passkey"] and len({s["context"] for s in rows}) == 1:
        made["answers"] = plots.answer_bars(rows, folder / "answers.png")
    else:
        made["answers"] = plots.answer_maps(rows, folder / "answers.png")
    for task in tasks:
        own = [s for s in rows if s["task"] == task and s["by_depth"]]
        if max((len(s["by_depth"]) for s in own), default=0) >= pictures.N_DEPTHS:
            name = f"depths-{task}"
            made[name] = pictures.needle_grid(own, task, grid_methods(own), folder / f"{name}.png")
    return made


def answer_budget(scores: list[dict]) -> str:
    """The share nearest to 5 % among those of the tasks that ask."""
    shares = {share_of(s["budget"]) for s in scores if s.get("by_depth")} - {None} or {0.05}
    return f"{min(shares, key=lambda b: abs(b - 0.05)):g}"


def grid_methods(own: list[dict], most: int = 6) -> list[str]:
    """Dense, the oracles and saap, the best of the others, and random as the floor."""
    names = list(dict.fromkeys(s["method"] for s in own))
    means = {
        n: sum(s["accuracy"] for s in own if s["method"] == n) / sum(s["method"] == n for s in own)
        for n in names
    }
    first = [n for n in ("dense", "oracle-tokens", "oracle", "saap") if n in names]
    others = sorted((n for n in names if n not in (*first, "random")), key=lambda n: -means[n])
    last = ["random"] if "random" in names else []
    return [*first, *others[: most - len(first) - len(last)], *last]


def make_report(folder: Path) -> Path:
    """Score, plot and write `report.html`; needs the records only, no model."""
    run, records = read_run(folder)
    scores = score_run(folder)
    made = make_plots(scores, records, folder)
    attention = [s for s in scores if s["task"] == "attention"]
    contexts = sorted({s["context"] for s in attention}, reverse=True)
    leaderboards = [table(scores, c, main_budget(scores), run) for c in contexts]
    figures = [figure(name, path) for name, path in made.items()]
    write_atomically(folder / "scores.csv", csv_text(scores).encode())
    config, environment = run["config"], run.get("environment", {})
    page = Template(TEMPLATE.read_text()).substitute(
        title=html.escape(f"Saap on {Path(str(run.get('model'))).name}"),
        headline=headline(scores),
        suspicions=warning(check_folder(folder)),
        content="".join(
            [
                *figures[:1],
                *leaderboards[:1],
                *figures[1:],
                *leaderboards[1:],
                answer_section(scores),
                speed_section(scores),
            ]
        ),
        settings=definition_list(
            {
                "model": run.get("model"),
                **{k: v for k, v in config.items()},
                **{k: environment.get(k) for k in ("device", "cores", "threads", "python")},
                **(environment.get("packages") or {}),
                **({"index": run["index"]} if run.get("index") else {}),
            }
        ),
    )
    path = folder / "report.html"
    write_atomically(path, page.encode())
    return path


def headline(scores: list[dict]) -> str:
    attention = [s for s in scores if s["task"] == "attention"]
    if not attention:
        return ""
    context = max(s["context"] for s in attention)
    own = {r["method"]: r for r in table_rows(scores, context, main_budget(scores))}
    if "saap" not in own:
        return ""
    saap = own["saap"]
    text = (
        f"At {context:,} tokens, visiting {saap['selectivity']:.1%} of the cache, saap finds "
        f"<b>{saap['recall_middle']:.0%}</b> of the attention mass of the middle"
    )
    if saap["recall_of_oracle"] is not None:
        text += f", {saap['recall_of_oracle']:.0%} of what an oracle finds in as many rows"
    text += lost(saap, ", and loses {} of its needles")
    others = [
        f"{own[name]['recall_middle']:.0%}{lost(own[name], ' and lose {}')} ({name})"
        for name in COMPARED
        if name in own
    ]
    if others:
        text += f"; others find {', '.join(others)}"
    return f"<p class=lead>{text}.</p>"


def lost(score: dict, form: str) -> str:
    """Needles that are lost, in words; none where a text has no needles."""
    share = score["needles_lost"]
    return "" if share is None else form.format(told_lost(share))


def warning(lines: list[str]) -> str:
    if not lines:
        return ""
    listed = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return (
        "<section class=warning><b>Some results are suspicious.</b> Read nothing else here before "
        f"they are explained.<ul>{listed}</ul></section>"
    )


def table(scores: list[dict], context: int, budget: str, run: dict) -> str:
    head = "".join(f"<th>{title}</th>" for _, title, _, _ in COLUMNS)
    body = "".join(
        "<tr{}>{}</tr>".format(
            " class=ours" if row["method"] == "saap" else "",
            "".join(
                f"<td>{html.escape(cell(row.get(key), form))}</td>" for key, _, _, form in COLUMNS
            ),
        )
        for row in table_rows(scores, context, budget)
    )
    return (
        f"<h2>{context:,} tokens, {100 * float(budget):.3g}% of the cache</h2>"
        f"<p class=note>{budget_note(context, budget, run)}</p>"
        f"<div class=scroll><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def budget_note(context: int, budget: str, run: dict) -> str:
    """How the budget is counted: in rows, and in bytes."""
    rows = run.get("attention_rows", {}).get(str(context))
    told = ""
    if rows:
        total, sinks, window = rows["context"], rows["sinks"], rows["window"]
        whole = round(float(budget) * total)
        told = (
            f"The budget is {whole:,} of {total:,} rows in each KV head: {sinks} sinks, {window} "
            f"of the recent window, and {whole - sinks - window:,} of the middle that the method "
            "chooses. The tokens that ask come after them, and see each other on top. "
        )
    return told + (
        "kB are the keys and values of all visited rows, and whatever choosing reads: router "
        "weights, centroids, summaries, codes. Oracles and random read nothing to choose: they "
        f"are bounds, no methods. Needles are rows of the middle that have {LEAST:.0%} of a "
        "head's attention or more; lost is the share of what they hold that is in rows not "
        "visited."
    )


def figure(name: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img alt="{name}" src="data:image/png;base64,{data}">'
        f"<figcaption>{CAPTIONS[name.split('-')[0]]}</figcaption></figure>"
    )


def definition_list(items: dict) -> str:
    return (
        "<dl>"
        + "".join(
            f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(readable(v))}</dd>"
            for k, v in items.items()
        )
        + "</dl>"
    )


def readable(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {readable(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)
