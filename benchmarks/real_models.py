"""Pretrained models judged end to end: `docs/real_models.md` from results of `saap eval`.

    make models
    saap eval smollm2 --corpus prose2 --contexts 4096 --tasks attention,passkey,perplexity \\
        --methods dense,oracle-tokens,saap,pq,blend,quest --budgets 0.05,0.1 \\
        --answer-budgets 0.05,0.1 --texts 2 --prompts 10 --out runs/smollm2-4k
    saap eval smollm2 --corpus prose2 --contexts 4096 --tasks passkey,perplexity \\
        --methods dense,saap --search saap.min_weight=0.0022,0.0005 --search saap.max_tokens=600 \\
        --answer-budgets 0.05 --texts 16 --prompts 50 --out runs/by-weight
    saap eval smollm2 --corpus prose2 --contexts 4096 --tasks multi-key,multi-query,multi-value \\
        --methods dense,oracle-tokens,saap --answer-budgets 0.05,0.1 --prompts 10 --out runs/keys
    python -m benchmarks.real_models [--add] runs/smollm2-4k ...

Scores of all folders, with `--add` beside those that are there, go to
`benchmarks/results/<device>/real_models.json`, raw records stay where they are. The text that is
judged is another than any that a method learned from.
"""

import json
import sys
from pathlib import Path

from saap.eval.records import read_run
from saap.eval.scores import score_run

from . import reports
from .cpu import cpu_name
from .selectors_page import markdown

PAGE = reports.ROOT / "docs" / "real_models.md"
COMMAND = "python -m benchmarks.real_models"
KEPT = (
    "method", "task", "context", "budget", "selectivity", "bytes_read", "router_bytes",
    "recall_middle", "recall_of_oracle", "output_error", "worst_head", "accuracy", "nll",
    "to_dense", "prompts", "questions", "texts", "queries",
)  # fmt: skip


OTHERS = (
    "multi-key", "multi-query", "multi-value", "variable-tracking", "common-words",
    "frequent-words", "copying",
)  # fmt: skip
"""Tasks that ask, beside pass keys."""


WIDE = 1 / 40
"""Windows of at least this share of the context go without saying: the page says it."""


def summary(folder: Path) -> dict:
    """What a folder's run was, and the scores of all methods without those of single heads."""
    run, _ = read_run(folder)
    scores = [
        {name: s[name] for name in KEPT if s.get(name) is not None} for s in score_run(folder)
    ]
    config = {k: run["config"][k] for k in ("n_texts", "n_prompts", "n_queries", "n_scored")}
    return {
        "model": Path(run["model"]).name,
        "version": run["version"],
        "index": run["index"] is not None,
        "environment": run["environment"],
        "config": config,
        "chat": run["config"].get("chat", False),
        "windows": {c: rows["window"] for c, rows in run.get("attention_rows", {}).items()},
        "scores": scores,
    }


def tables(found: list[dict]) -> str:
    """One table for each run, context and budget; runs of a model by their contexts."""
    parts = []
    models = [run["model"] for run in found]
    for run in sorted(
        found, key=lambda r: (models.index(r["model"]), min(s["context"] for s in r["scores"]))
    ):
        scores = run["scores"]
        places = {(s["context"], s["budget"]) for s in scores if s["method"] != "dense"}
        by_weight = {place for place in places if "min_weight" in place[1]}
        for context in sorted({context for context, _ in by_weight}):
            parts.append(
                f"**{run['model']}, {context:,} tokens, rows by weight** "
                f"({told(scores, context)}):\n\n{weight_rows(scores, context)}"
            )
        for context, budget in sorted(places - by_weight):
            rows = table_rows(scores, context, budget)
            share, *options = budget.split()
            window = run.get("windows", {}).get(str(context), WIDE * context)
            if "window" not in budget and window < WIDE * context:
                options.append(f"window={window}")
            if run.get("chat"):
                options.append("chat template")
            if rows:
                parts.append(
                    f"**{run['model']}, {context:,} tokens, {float(share):.0%} of the rows** "
                    f"({', '.join([told(scores, context), *options])}):\n\n{rows}"
                )
    return "\n\n".join(parts)


def told(scores: list[dict], context: int) -> str:
    """How much was judged."""
    most: dict[str, int] = {}
    for s in scores:
        if s["context"] == context:
            for name in ("prompts", "questions", "texts"):
                most[name] = max(most.get(name, 0), s.get(name, 0))
    if most["questions"] <= most["prompts"]:
        del most["questions"]
    return ", ".join(f"{n} {name}" for name, n in most.items() if n)


def table_rows(scores: list[dict], context: int, budget: str) -> str:
    by_place = {(s["task"], s["method"]): s for s in scores
                if s["context"] == context and s["budget"] == budget}  # fmt: skip
    names = list(dict.fromkeys(name for _, name in by_place))
    names.sort(key=lambda n: -by_place.get(("attention", n), {}).get("recall_middle", 0.0))
    rows = []
    for name in names:
        attention = by_place.get(("attention", name), {})
        keys, text = by_place.get(("passkey", name), {}), by_place.get(("perplexity", name), {})
        others = [by_place.get((task, name), {}) for task in OTHERS]
        bytes_of = attention or text or keys or next(s for s in others if s)
        rows.append(
            [
                f"`{name}`",
                cell(attention.get("recall_middle"), "{:.1%}"),
                cell(attention.get("recall_of_oracle"), "{:.1%}"),
                cell(attention.get("output_error"), "{:.3f}"),
                cell(bytes_of.get("bytes_read"), "{:,.0f}", 1e-3),
                cell(bytes_of.get("router_bytes"), "{:,.0f}", 1e-3),
                cell(keys.get("accuracy"), "{:.0%}"),
                *[cell(own.get("accuracy"), "{:.0%}") for own in others],
                cell((text.get("to_dense") or [None])[0], "{:+.3f}"),
            ]
        )
    head = [
        "method", "recall of the middle", "of the oracle's", "output error",
        "kB per layer and step", "of them to choose", "pass keys", *OTHERS, "nats over dense",
    ]  # fmt: skip
    return markdown(*without_empty(head, rows)) if rows else ""


def without_empty(head: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """The columns in which something was measured."""
    kept = [i for i in range(len(head)) if any(row[i] != "–" for row in rows)]
    return [head[i] for i in kept], [[row[i] for i in kept] for row in rows]


def weight_rows(scores: list[dict], context: int) -> str:
    """A row for each least weight, by what is visited; the model's own attention comes last."""
    rows = []
    places = {(s["method"], s["budget"]): s["selectivity"] for s in scores
              if s["context"] == context and s["task"] == "perplexity"}  # fmt: skip
    for (method, budget), visited in sorted(places.items(), key=lambda p: p[1]):
        if method == "dense" and any(row[0] == "`dense`" for row in rows):
            continue
        keys, text = (
            next(
                s for s in scores
                if (s["context"], s["task"], s["method"], s["budget"])
                == (context, task, method, budget)
            )
            for task in ("passkey", "perplexity")
        )  # fmt: skip
        bounds = dict(part.split("=") for part in budget.split() if "=" in part)
        rows.append(
            [
                f"`{method}`",
                cell(None if method == "dense" else bounds.get("min_weight"), "{}"),
                f"{keys['selectivity']:.1%}",
                f"{visited:.1%}",
                cell(text["bytes_read"], "{:,.0f}", 1e-3),
                f"{keys['accuracy']:.0%}",
                cell((text.get("to_dense") or [None])[0], "{:+.3f}"),
            ]
        )
    head = [
        "method", "`min_weight`", "visited for pass keys", "visited for text",
        "kB per layer and step", "pass keys", "nats over dense",
    ]  # fmt: skip
    return markdown(head, rows)


def cell(value, form: str, factor: float = 1.0) -> str:
    if value is None:
        return "–"
    return form.format(factor * value if isinstance(value, float) else value)


def main(folders: list[str]) -> None:
    if not folders:
        raise SystemExit(__doc__)
    path = reports.report_path(cpu_name(), "real_models.json")
    add, folders = "--add" in folders, [folder for folder in folders if folder != "--add"]
    found = json.loads(path.read_text())["runs"] if add else []
    found += [summary(Path(folder)) for folder in folders]
    reports.write(path, {"runs": found})
    reports.put_table(PAGE, COMMAND, tables(found))
    print(f"wrote {path} and {PAGE}")


if __name__ == "__main__":
    main(sys.argv[1:])
