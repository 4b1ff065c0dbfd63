"""Run an evaluation: every unit of work once, records first; nothing is scored here."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from saap import hf
from saap.trained_index import TrainedIndex

from .arms import check_method_entry, make_arms
from .environment import environment, version
from .records import RecordFile
from .tasks.base import Bench
from .tasks.registry import DEFAULT_TASKS, TASKS, find_task

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class EvalConfig:
    """What is evaluated. `budgets` are shares of the context, sinks and window counted in.

    `methods`: names, or mappings with `name`, `build` and `search` (see `saap.eval.arms`).
    """

    methods: tuple[str | dict, ...]
    contexts: tuple[int, ...]
    budgets: tuple[float, ...] = (0.05,)
    tasks: tuple[str, ...] = DEFAULT_TASKS
    share: str = "group"
    n_texts: int = 8
    n_queries: int = 64
    n_prompts: int = 20
    n_distractors: int = 8
    n_scored: int = 64
    answer_budgets: tuple[float, ...] = (0.05,)
    seed: int = 0

    def __post_init__(self):
        for name in ("methods", "contexts", "budgets", "answer_budgets", "tasks"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: accepted is at least one")
        for entry in self.methods:
            check_method_entry(entry)
        for task in self.tasks:
            find_task(task)
        if self.share not in ("group", "head"):
            raise ValueError(f"share={self.share!r}: accepted are 'group' and 'head'")


def check_contexts(contexts: tuple[int, ...], limit: int, trained: int | None) -> list[str]:
    """Warnings for contexts beyond training; ValueError for those the model cannot hold."""
    warnings = []
    for context in contexts:
        if context > limit:
            raise ValueError(
                f"context {context}: accepted are at most the model's "
                f"max_position_embeddings={limit}"
            )
        if context < 256:
            raise ValueError(f"context {context}: accepted are 256 and more")
        if trained is not None and context > trained:
            warnings.append(
                f"context {context} is longer than the {trained} tokens that the index was "
                "trained on: routers have not seen such distances, read their recall with care"
            )
    return warnings


def run(
    model,
    tokenizer,
    index: TrainedIndex | None,
    text: bytes,
    config: EvalConfig,
    out: Path,
    *,
    model_name: str,
    progress: Progress | None = None,
) -> None:
    """Write `run.json` and `records.jsonl` into `out`, continuing what is there already."""
    progress = progress or (lambda what, done, total: None)
    records = RecordFile(
        out,
        {
            "model": model_name,
            "version": version(),
            "config": as_plain(config),
            "environment": environment(),
            "index": None
            if index is None
            else {k: v for k, v in index.metadata.items() if k not in ("model", "recall")},
            "trained_recall": None if index is None else index.metadata["recall"],
        },
    )
    arms = make_arms(config.methods, index, config.seed)
    bench = Bench(model, tokenizer, text, arms, config)
    tasks = [TASKS[name]() for name in config.tasks]
    units = [
        (task, context, number)
        for task in tasks
        for context in config.contexts
        for number in range(task.n_units(config))
    ]
    for done, (task, context, number) in enumerate(units):
        unit = f"{task.name}/{context}/{number}"
        progress(f"{task.name} at {context}", done, len(units))
        if unit in records.done:
            continue
        found, judged = task.run_unit(bench, context, number)
        place = {"task": task.name, "context": context}
        records.write(
            unit, [{**place, **r} for r in found], hashlib.sha256(judged).hexdigest()[:16]
        )
    progress("done", len(units), len(units))


def as_plain(config: EvalConfig) -> dict:
    """As it comes back from a JSON file."""
    return json.loads(json.dumps(asdict(config)))


def load_for_eval(model_source, index_path: Path | None):
    """Model, tokenizer and index; ValueError when the index was trained for another model."""
    index = None if index_path is None else TrainedIndex.load(index_path)
    model = hf.load_model(model_source)
    if index is not None:
        index.check_model(hf.describe(model))
    return model, hf.load_tokenizer(model_source), index
