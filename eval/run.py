"""Run an evaluation: every unit of work once, records first; nothing is scored here."""

import functools
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from saap import hf
from saap.budget import Budget, is_integer
from saap.trained_index import TrainedIndex

from .claims import claimed
from .environment import environment, version
from .records import RUN, RecordFile, is_begun, read_settings
from .tasks.base import Bench
from .tasks.chat import ChatTemplate
from .tasks.registry import DEFAULT_TASKS, TASKS, find_task
from .variants import Point, Variant, check_method_entry, make_variants
from .workers import Crew, crew_for, results, usable_cores

LEAST = {
    "n_texts": 1, "n_queries": 1, "n_prompts": 1, "n_questions": 1, "n_distractors": 0,
    "n_scored": 2,
}  # fmt: skip
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class EvalConfig:
    """What is evaluated. `budgets` are shares of the context, sinks and window counted in.

    `methods`: names, or mappings with `name`, `build` and `search` (see `saap.eval.variants`).
    `n_questions`: how many of the keys in a prompt are asked for, each as if it were the only one.
    `chat`: ask in the model's chat template.
    `window`: the newest tokens that every method visits.
    """

    methods: tuple[str | dict, ...]
    contexts: tuple[int, ...]
    budgets: tuple[float, ...] = (0.05,)
    tasks: tuple[str, ...] = DEFAULT_TASKS
    share: str = "group"
    window: int = Budget.window
    n_texts: int = 8
    n_queries: int = 64
    n_prompts: int = 20
    n_questions: int = 1
    n_distractors: int = 8
    n_scored: int = 64
    answer_budgets: tuple[float, ...] = (0.05,)
    chat: bool = False
    seed: int = 0

    def __post_init__(self):
        for name in ("methods", "contexts", "budgets", "answer_budgets", "tasks"):
            values = getattr(self, name)
            if not values:
                raise ValueError(f"{name} must hold at least one value; got none")
            for value in values:
                if values.count(value) > 1:
                    raise ValueError(f"{name} must hold each value once; got {value!r} twice")
        for name in ("budgets", "answer_budgets"):
            for share in getattr(self, name):
                if not 0 < share <= 1:
                    raise ValueError(f"{name} must be above 0 and at most 1; got {share}")
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}")
        if self.n_questions > self.n_distractors + 1:
            raise ValueError(
                f"n_questions must be at most the {self.n_distractors + 1} keys that a prompt "
                f"has with n_distractors={self.n_distractors}; got {self.n_questions}"
            )
        for entry in self.methods:
            check_method_entry(entry)
        for task in self.tasks:
            find_task(task)
        if not is_integer(self.window, 1):
            raise ValueError(f"window must be an integer of at least 1; got {self.window!r}")
        if self.share not in ("group", "head"):
            raise ValueError(f"share must be 'group' or 'head'; got {self.share!r}")


def check_contexts(contexts: tuple[int, ...], limit: int, trained: int | None) -> list[str]:
    """Return warnings for contexts longer than in training.

    Raises ValueError for contexts that the model cannot hold.
    """
    warnings = []
    for context in contexts:
        if context > limit:
            raise ValueError(
                f"context must be at most the model's max_position_embeddings={limit}; got "
                f"{context}"
            )
        if context < 256:
            raise ValueError(f"context must be at least 256; got {context}")
        if trained is not None and context > trained:
            warnings.append(
                f"context {context} is longer than the {trained} tokens that the index was "
                "trained on: routers have not seen such distances, read their recall with care"
            )
    return warnings


@dataclass(frozen=True)
class Unit:
    """One text or prompt of a task, judged for all variants and points."""

    task: str
    context: int
    number: int

    def __str__(self) -> str:
        return f"{self.task}/{self.context}/{self.number}"


def plan(config: EvalConfig) -> list[Unit]:
    """All units in the order of their records; those that are timed come last."""
    units = [
        Unit(name, context, number)
        for name in config.tasks
        for context in config.contexts
        for number in range(TASKS[name]().n_units(config))
    ]
    return sorted(units, key=lambda unit: TASKS[unit.task].timed)


def work(bench: Bench, unit: Unit) -> tuple[list[dict], str]:
    """Raw records of the unit, and a hash of the text or prompt that was judged."""
    found, judged = TASKS[unit.task]().run_unit(bench, unit.context, unit.number)
    place = {"task": unit.task, "context": unit.context}
    return [{**place, **r} for r in found], hashlib.sha256(judged).hexdigest()[:16]


@dataclass(frozen=True)
class Source:
    """Where workers find what they judge: a folder or hub name, and an index file if any."""

    model: str | Path
    index: Path | None
    text: bytes
    name: str

    def open(self, config: EvalConfig) -> Bench:
        model, tokenizer, index = load_for_eval(self.model, self.index)
        return make_bench(model, tokenizer, index, self.text, config)


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
    with claimed(out):
        bench = make_bench(model, tokenizer, index, text, config)
        records = open_records(bench, index, out, model_name, environment())
        units = [unit for unit in plan(config) if str(unit) not in records.done]
        write_all(records, units, (work(bench, unit) for unit in units), progress)


def run_with_workers(
    source: Source,
    config: EvalConfig,
    out: Path,
    *,
    jobs: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    warn: Callable[[str], None] = lambda line: None,
) -> None:
    """`run` by worker processes: as many as cores and memory allow if `jobs` is None.

    A run that continues keeps its number of threads, and so its figures. Tasks that are timed run
    when all others are done, one at a time, with all cores.
    """
    with claimed(out):
        model, tokenizer, index = load_for_eval(source.model, source.index)
        trained = None if index is None else index.metadata["context"]
        for line in check_contexts(config.contexts, hf.max_context(model), trained):
            warn(line)
        bench = make_bench(model, tokenizer, index, source.text, config)
        need = memory_need(model, max(config.contexts))
        crew = crew_for(need, jobs, threads_before(out) if threads is None else threads)
        described = {**environment(), "threads": crew.threads}
        records = open_records(bench, index, out, source.name, described)
        del model, bench  # the workers need the memory
        units = [unit for unit in plan(config) if str(unit) not in records.done]
        write_all(records, units, by_crew(source, config, units, crew), progress)


def by_crew(source: Source, config: EvalConfig, units: list[Unit], crew: Crew) -> Iterable:
    first_timed = sum(not TASKS[unit.task].timed for unit in units)
    opener = functools.partial(source.open, config)
    yield from results(opener, work, units[:first_timed], crew)
    yield from results(opener, work, units[first_timed:], Crew(1, usable_cores()))


def make_bench(model, tokenizer, index, text: bytes, config: EvalConfig) -> Bench:
    """ValueError for budgets that a context cannot keep, or a method cannot follow, or that are
    the same to what they are called by, and for chat without a template."""
    if config.chat:
        ChatTemplate.of(tokenizer)
    variants = make_variants(config.methods, index, config.seed)
    bench = Bench(model, tokenizer, text, variants, config)
    searched = [layer.info for layer in hf.model_layers(model) if layer.is_full]
    tasks = [TASKS[name]() for name in config.tasks if TASKS[name].budgets is not None]
    for task, context in itertools.product(tasks, config.contexts):
        n = task.context_rows(config, context)
        if n < 1:
            raise ValueError(
                f"context must be longer than the {context - n} tokens of {task.name} that ask; "
                f"got {context}"
            )
        try:
            judged = bench.points(n, getattr(config, task.budgets))
        except ValueError as error:
            before = "" if n == context else f", {n:,} of them before those that ask"
            raise ValueError(
                f"{task.budgets} of {task.name} at {context:,} tokens{before}: {error}"
            ) from None
        check_labels(judged)
        for variant, points in judged:
            for layer in searched[:1]:
                selector = variant.method.selector(layer)
                for point in points:
                    selector.check_budget(point.budget)
    return bench


def check_labels(judged: list[tuple[Variant, list[Point]]]) -> None:
    """Records are told apart by them: ValueError where two are the same."""
    known = set()
    for place in ((v.label, point.label) for v, points in judged for point in points):
        if place in known:
            raise ValueError(
                "each method must be given once at each budget; got {} at {} twice".format(*place)
            )
        known.add(place)


def open_records(
    bench: Bench, index: TrainedIndex | None, out: Path, model_name: str, described: dict
) -> RecordFile:
    """What is judged and by what, written first; ValueError where `out` holds another run."""
    about = {} if index is None else index.metadata
    return RecordFile(
        out,
        {
            "model": model_name,
            "weights": weights_fingerprint(bench.model),
            "text": hashlib.sha256(bench.text).hexdigest()[:16],
            "version": version(),
            "config": as_plain(bench.config),
            "units": Counter(f"{unit.task}/{unit.context}" for unit in plan(bench.config)),
            "attention_rows": {
                str(c): attention_rows(c - bench.config.n_queries, bench.config.window)
                for c in bench.config.contexts
            },
            "environment": described,
            "index": {k: v for k, v in about.items() if k not in ("model", "recall")} or None,
            "trained_recall": about.get("recall"),
        },
    )


def attention_rows(n: int, window: int) -> dict:
    """The context of the attention task, and what of it every method visits."""
    layout = Budget(max_tokens=0, window=window)
    sinks = layout.n_sink
    return {"context": n, "sinks": sinks, "window": n - sinks - layout.rows_in_lists(n)}


def memory_need(model, context: int) -> int:
    """Bytes of a worker, roughly: libraries, weights, and four caches of the longest context:
    the prefill's, without RoPE too, and two stores of methods."""
    described = hf.describe(model)
    rows = 2 * described["num_layers"] * described["num_kv_heads"] * context
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return 10**9 + weights + 4 * rows * described["head_dim"] * 4


def threads_before(out: Path) -> int | None:
    """How many threads the run in that folder was begun with; None where there is none."""
    if not is_begun(out):
        return None
    return read_settings(out / RUN).get("environment", {}).get("threads")


def write_all(
    records: RecordFile, units: list[Unit], found: Iterable, progress: Progress | None
) -> None:
    """`progress` counts tokens of context: long contexts take longer than short ones."""
    progress = progress or (lambda what, done, total: None)
    total, done = sum(unit.context for unit in units), 0
    progress("start" if units else "nothing is left to do", 0, total)
    with records.begun():
        for unit, (rows, judged) in zip(units, found, strict=True):
            records.write(str(unit), rows, judged)
            done += unit.context
            progress(f"{unit.task} at {unit.context}", done, total)


def weights_fingerprint(model) -> str:
    """A hash of the beginning of every parameter: another training or checkpoint is another."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        beginning = parameter.detach().flatten()[:1024].float().cpu().numpy()
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + beginning.tobytes())
    return digest.hexdigest()[:16]


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
