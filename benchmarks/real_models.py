"""Pretrained models judged end to end: `docs/real_models.md` from results of `saap eval`.

    make models GEMMA=1
    run() { saap eval --corpus prose2 "$@"; }
    few="--methods dense,oracle-tokens,saap" best="$few,pq" all="$best,blend,quest"
    keys="--tasks passkey --questions 4 --answer-budgets 0.02,0.05"
    multi="--tasks multi-key --questions 4 --answer-budgets 0.02,0.05"
    text="--tasks perplexity --answer-budgets 0.02,0.05,0.1"
    more="--answer-budgets 0.01,0.02,0.05,0.1"
    att="--tasks attention --budgets 0.02,0.05,0.1,0.2"
    run smollm2 --contexts 2048 $att --texts 4 $all --out runs/2k
    run smollm2 --contexts 2048 $keys --prompts 12 $best --out runs/2k-keys
    run smollm2 --contexts 2048 $text --texts 8 $best --out runs/2k-text
    run smollm2 --contexts 4096 $keys --prompts 12 $all --out runs/4k-keys
    run smollm2 --contexts 4096 $keys --prompts 13 --seed 1 $all --out runs/4k-keys-1
    run smollm2 --contexts 4096 $text --texts 16 $all --out runs/4k-text
    run smollm2 --contexts 4096 $att --texts 4 $all --out runs/4k
    run smollm2 --contexts 4096 $multi --prompts 10 $few --out runs/4k-multi
    run smollm2 --contexts 4096 $multi --prompts 15 --seed 1 $few --out runs/4k-multi-1
    run smollm2 --contexts 4096 $keys --prompts 12 --methods saap --out runs/4k-weight \\
        --search saap.min_weight=0.004,0.002 --search saap.max_tokens=600
    run smollm2 --contexts 4096 $keys --prompts 12 --methods saap --out runs/4k-left-out \\
        --search saap.estimate_rest=false
    run smollm2 --contexts 8192 $att --texts 4 $all --out runs/8k
    run smollm2 --contexts 8192 $keys --prompts 12 $best --out runs/8k-keys
    run smollm2 --contexts 8192 $keys --prompts 13 --seed 1 $best --out runs/8k-keys-1
    run smollm2 --contexts 8192 $text --texts 16 $best --out runs/8k-text
    run gemma3-270m --contexts 8192 $att --texts 4 $best --out runs/gemma
    run gemma3-270m --contexts 8192 $keys --prompts 8 $best --out runs/gemma-keys
    run gemma3-270m --contexts 8192 $text --texts 8 $best --out runs/gemma-text
    run gemma3-270m --contexts 16384 $att --texts 2 $few --out runs/gemma-16k
    run gemma3-270m --contexts 32768 $att --texts 1 $few --out runs/gemma-32k
    run gemma3-270m --contexts 16384 $text $more --texts 4 $few --out runs/gemma-16k-text
    run gemma3-270m --contexts 32768 $text $more --texts 4 $few --out runs/gemma-32k-text
    run gemma3-270m --contexts 32768 $keys --answer-budgets 0.01,0.02,0.05 --prompts 4 $few \\
        --out runs/gemma-32k-keys
    python -m benchmarks.real_models [--add] runs/*

Scores of all folders, with `--add` beside those that are there, go to
`benchmarks/results/real_models.json`, raw records stay where they are. Runs of a model at
one context make one table; of what two of them measured, the later one counts, but questions that
were asked with different seeds count together. What has another window in the table was run with
that `--window`. The text that is judged is another than any that a method learned from.
"""

import json
import sys
from pathlib import Path

from saap.eval.records import read_run
from saap.eval.scores import score_run
from saap.eval.units import share_of, told_lost, told_search

from . import reports
from .reports import cell, markdown

PAGE = reports.ROOT / "docs" / "real_models.md"
COMMAND = "python -m benchmarks.real_models"
KEPT = (
    "method", "task", "context", "budget", "selectivity", "bytes_read", "router_bytes",
    "recall_middle", "needles_lost", "output_error", "worst_head", "accuracy", "nll",
    "divergence", "to_dense", "prompts", "questions", "texts", "queries",
)  # fmt: skip
ASKED = {
    "passkey": "pass keys",
    **{name: name for name in (
        "multi-key", "multi-query", "multi-value", "variable-tracking", "common-words",
        "frequent-words", "copying",
    )},
}  # fmt: skip
"""Tasks that ask, and what their columns are called."""

METHODS = ("dense", "oracle-tokens", "saap", "pq", "blend", "quest")
"""In their order in a table; others come after them."""

MODELS = ("smollm2", "gemma3-270m")
"""In the order of their tables; others come after them."""

Row = tuple[str, str]  # budget, method


def summary(folder: Path) -> dict:
    """What a folder's run was, and the scores of all methods without those of single heads."""
    run, _ = read_run(folder)
    scores = [
        {name: s[name] for name in KEPT if s.get(name) is not None} for s in score_run(folder)
    ]
    kept = ("n_texts", "n_prompts", "n_queries", "n_scored", "seed", "window")
    config = {k: run["config"][k] for k in kept}
    return {
        "model": Path(run["model"]).name,
        "version": run["version"],
        "text": run["text"],
        "index": run["index"] is not None,
        "environment": run["environment"],
        "config": config,
        "chat": run["config"].get("chat", False),
        "scores": scores,
    }


def runs_of(path: Path, given: list[str]) -> list[dict]:
    """Summaries of the folders given, with `--add` behind those that are there; written there."""
    found = json.loads(path.read_text())["runs"] if "--add" in given else []
    found = latest(found + [summary(Path(folder)) for folder in given if folder != "--add"])
    reports.write(path, {"runs": found})
    return found


def latest(runs: list[dict]) -> list[dict]:
    """The runs without scores that a later one has anew, or that a later one of the task has from
    another text: packages of documentation change, and methods are compared on one text."""
    known, texts, kept = set(), {}, []
    for run in reversed(runs):
        of_run, seed = (run["model"], run["chat"]), run["config"].get("seed", 0)
        new = {}
        for score in run["scores"]:
            task = *of_run, score["context"], score["task"]
            what = *task, score["method"], score["budget"], seed
            if what not in known and texts.setdefault(task, run["text"]) == run["text"]:
                new[what] = score
        known |= new.keys()
        if new:
            kept.append({**run, "scores": list(new.values())})
    return kept[::-1]


def tables(found: list[dict]) -> str:
    """One table for each model and context; runs in a chat template have their own."""
    places: dict[tuple, list[dict]] = {}
    for run in found:
        for score in run["scores"]:
            place = run["model"], run["chat"], score["context"]
            config = run["config"]
            own = {"seed": config.get("seed", 0), "window": window_of(config, score["context"])}
            places.setdefault(place, []).append({**score, **own})
    models = list(dict.fromkeys([*MODELS, *(run["model"] for run in found)]))
    parts = []
    for model, chat, context in sorted(places, key=lambda p: (models.index(p[0]), *p[1:])):
        scores = pooled(places[model, chat, context])
        asked = "asked in the chat template; " if chat else ""
        parts.append(
            f"**{model}, {context:,} tokens** ({asked}{counted(scores)}):\n\n{table(scores)}"
        )
    return "\n\n".join(parts)


def window_of(config: dict, context: int) -> int:
    """The most recent tokens that every method visited; of runs that do not say, by the rule of
    their time."""
    return config.get("window") or min(max(16, context // 128), 64)


def pooled(scores: list[dict]) -> list[dict]:
    """One score for what was asked with several seeds, which are other documents."""
    found: dict[tuple, dict] = {}
    for s in scores:
        what = tuple(s[k] for k in ("task", "method", "budget"))
        before = found.get(what)
        if before is not None and s["task"] in ASKED:
            n = before["questions"] + s["questions"]
            right = sum(own["accuracy"] * own["questions"] for own in (before, s))
            s = {**s, "accuracy": right / n, "questions": n,
                 "prompts": before["prompts"] + s["prompts"]}  # fmt: skip
        found[what] = s
    return list(found.values())


def counted(scores: list[dict]) -> str:
    """How much was judged, by task."""
    told = []
    for task, title in ASKED.items():
        own = [s for s in scores if s["task"] == task]
        if own:
            prompts, questions = (max(s[k] for s in own) for k in ("prompts", "questions"))
            of = "" if questions == prompts else f" about {prompts} documents"
            told.append(f"{title}: {questions} questions{of}")
    for task, key, form in (
        ("perplexity", "texts", "nats: {} texts"), ("attention", "queries", "recall: {} queries")
    ):  # fmt: skip
        own = [s[key] for s in scores if s["task"] == task]
        told += [form.format(max(own))] if own else []
    return "; ".join(told)


def table(scores: list[dict]) -> str:
    """By the share that is visited, dense attention first; then by method."""
    rows: dict[Row, dict[str, dict]] = {}
    for s in scores:
        budget = "" if s["method"] == "dense" else s["budget"]
        rows.setdefault((budget, s["method"]), {})[s["task"]] = s
    order = sorted(rows, key=lambda row: (visited(*row, rows[row]), row[0], place_of(row[1])))
    head = [
        "rows", "window", "method", "recall", "needles lost", "error", "kB", "to choose",
        *ASKED.values(), "nats over dense", "nats from dense",
    ]  # fmt: skip
    return markdown(*without_empty(head, [cells(row, rows[row]) for row in order]), n_texts=3)


def place_of(method: str) -> int:
    return METHODS.index(method) if method in METHODS else len(METHODS)


def visited(budget: str, method: str, of_task: dict[str, dict]) -> float:
    """The share of a budget's label, or for other bounds what was visited, of text if it was. 0
    for dense attention, which comes first."""
    if method == "dense":
        return 0.0
    share = share_of(budget)
    own = of_task.get("perplexity") or next(iter(of_task.values()))
    return own["selectivity"] if share is None else share


def cells(row: Row, of_task: dict[str, dict]) -> list[str]:
    budget, method = row
    text, attention = of_task.get("perplexity", {}), of_task.get("attention", {})
    bytes_of = attention or text or next(iter(of_task.values()))
    options, rows = [], "100%"
    if method != "dense":
        by_share = share_of(budget) is not None
        options = told_search(budget).split() if by_share else []
        rows = f"{visited(budget, method, of_task):{'.0%' if by_share else '.1%'}}"
        rows += "" if by_share else ", by weight"
    windows = sorted({s["window"] for s in of_task.values()})
    return [
        rows,
        "–" if method == "dense" else ", ".join(map(str, windows)),
        ", ".join(f"`{name}`" for name in (method, *options)),
        cell(attention.get("recall_middle"), "{:.1%}"),
        needles(attention),
        cell(attention.get("output_error"), "{:.3f}"),
        cell(bytes_of["bytes_read"], "{:,.0f}", 1e-3),
        cell(bytes_of["router_bytes"], "{:,.0f}", 1e-3),
        *(cell(of_task.get(task, {}).get("accuracy"), "{:.0%}") for task in ASKED),
        cell((text.get("to_dense") or [None])[0], "{:+.3f}"),
        cell(None if method == "dense" else text.get("divergence"), "{:.4f}"),
    ]


def needles(attention: dict) -> str:
    """Those that are lost, of a score of attention."""
    lost = attention.get("needles_lost")
    return "–" if lost is None else told_lost(lost)


def without_empty(head: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """The columns in which something was measured."""
    kept = [i for i in range(len(head)) if any(row[i] != "–" for row in rows)]
    return [head[i] for i in kept], [[row[i] for i in kept] for row in rows]


def main(folders: list[str]) -> None:
    if not folders:
        raise SystemExit(__doc__)
    path = reports.scores_path("real_models.json")
    found = runs_of(path, folders)
    reports.put_table(PAGE, COMMAND, tables(found))
    print(f"wrote {path} and {PAGE}")


if __name__ == "__main__":
    main(sys.argv[1:])
