"""Run an evaluation: every unit of work once, records first; nothing is scored here."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from saap import hf
from saap.budget import Budget
from saap.methods import find_method
from saap.trained_index import TrainedIndex
from saap.training import default_window

from .environment import environment
from .records import RecordFile
from .tasks import answering, attention, passkey

TASKS = ("attention", "passkey")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class EvalConfig:
    """What is evaluated. `budgets` are shares of the context, sinks and window counted in."""

    methods: tuple[str, ...]
    contexts: tuple[int, ...]
    budgets: tuple[float, ...] = (0.05,)
    tasks: tuple[str, ...] = TASKS
    share: str = "group"
    n_texts: int = 8
    n_queries: int = 64
    n_prompts: int = 20
    n_distractors: int = 8
    answer_budgets: tuple[float, ...] = (0.05,)
    seed: int = 0

    def __post_init__(self):
        for name in ("methods", "contexts", "budgets", "tasks"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: accepted is at least one")
        for name in self.methods:
            find_method(name)
        for task in self.tasks:
            if task not in TASKS:
                raise ValueError(f"task {task!r} is unknown: accepted are {', '.join(TASKS)}")
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
            "config": as_plain(config),
            "environment": environment(),
            "index": None
            if index is None
            else {k: v for k, v in index.metadata.items() if k not in ("model", "recall")},
            "trained_recall": None if index is None else index.metadata["recall"],
        },
    )
    methods = {name: find_method(name)(index, seed=config.seed) for name in config.methods}
    units = [
        (task, context, number)
        for task in config.tasks
        for context in config.contexts
        for number in range(config.n_texts if task == "attention" else config.n_prompts)
    ]
    for done, (task, context, number) in enumerate(units):
        unit = f"{task}/{context}/{number}"
        progress(f"{task} at {context}", done, len(units))
        if unit in records.done:
            continue
        evaluate = attention_unit if task == "attention" else passkey_unit
        found = evaluate(model, tokenizer, text, methods, config, context, number)
        records.write(unit, [{"task": task, "context": context, **r} for r in found])
    progress("done", len(units), len(units))


def as_plain(config: EvalConfig) -> dict:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}


def budgets_for(
    shares: tuple[float, ...], n_context: int, config: EvalConfig
) -> dict[str, Budget]:
    window = default_window(n_context)
    return {
        f"{share:g}": Budget.for_selectivity(
            share, n_context, n_sink=16, window=window, share=config.share
        )
        for share in shares
    }


def attention_unit(model, tokenizer, text, methods, config, context, number) -> list[dict]:
    tokens = text_tokens(tokenizer, text, context, number, config.n_texts)
    budgets = budgets_for(config.budgets, context - config.n_queries, config)
    return attention.evaluate(model, tokens, methods, budgets, config.n_queries)


def text_tokens(tokenizer, text: bytes, length: int, number: int, count: int) -> torch.Tensor:
    """The `number`-th of `count` evenly spread pieces of `length` tokens."""
    n_bytes = length * 8  # a token is at most a few bytes; the rest is cut off
    start = int(number * max(0, len(text) - min(n_bytes, len(text))) / max(1, count - 1))
    tokens = answering.encode(tokenizer, text[start : start + n_bytes])[:length]
    if len(tokens) < length:
        raise ValueError(f"the text gives {len(tokens)} tokens: context {length} needs as many")
    return tokens


def passkey_unit(model, tokenizer, text, methods, config, context, number) -> list[dict]:
    # Depths are spread evenly over the prompts, so that every run covers beginning to end.
    depth = (number + 0.5) / config.n_prompts * 0.95

    def make(n_bytes: int) -> passkey.PassKeyPrompt:
        rng = np.random.default_rng([config.seed, context, number])
        return passkey.make_prompt(
            text, n_bytes, rng, n_distractors=config.n_distractors, depth=depth
        )

    prompt = prompt_of_tokens(make, tokenizer, context - passkey.KEY_DIGITS - 8, len(text))
    n_context = len(answering.encode(tokenizer, prompt.context))
    budgets = budgets_for(config.answer_budgets, n_context, config)
    return answering.evaluate(
        model, tokenizer, prompt, passkey.is_right, methods, budgets, passkey.KEY_DIGITS + 1
    )


def prompt_of_tokens(make, tokenizer, n_tokens: int, most_bytes: int):
    """`make(n_bytes)` so long that it has at most `n_tokens` tokens, and nearly as many.

    A token is a byte for some tokenizers and several for others; text is not equally dense.
    """
    n_bytes = n_tokens
    prompt = make(n_bytes)
    for _ in range(6):
        found = len(answering.encode(tokenizer, prompt.text, special=False))
        if 0.98 * n_tokens <= found <= n_tokens or (found < n_tokens and n_bytes == most_bytes):
            break
        n_bytes = min(most_bytes, int(n_bytes * 0.99 * n_tokens / found))
        prompt = make(n_bytes)
    return prompt


def load_for_eval(model_source, index_path: Path | None):
    """Model, tokenizer and index; ValueError when the index was trained for another model."""
    index = None if index_path is None else TrainedIndex.load(index_path)
    model = hf.load_model(model_source)
    if index is not None:
        index.check_model(hf.describe(model))
    return model, hf.load_tokenizer(model_source), index
