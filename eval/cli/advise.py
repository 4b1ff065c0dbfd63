"""The command `saap advise`: how much of its cache a model should visit, and if that pays."""

import textwrap
from pathlib import Path
from typing import Annotated

import typer

from .decode import Index, Method, Model


def register(app: typer.Typer) -> None:
    app.command()(advise)


def advise(
    model: Model,
    corpus: Annotated[
        list[Path] | None,
        typer.Option(help="text to measure on: file or folder; if not given, shipped text"),
    ] = None,
    context: Annotated[int, typer.Option(help="context length in tokens")] = 8192,
    error: Annotated[
        float, typer.Option(help="mean relative error of attention's output to accept")
    ] = 0.1,
    method: Method = "saap",
    index: Index = None,
    texts: Annotated[int, typer.Option(help="number of texts to measure on")] = 2,
    by_weight: Annotated[
        bool,
        typer.Option(
            "--by-weight",
            help="also find min_weight and how much each layer matters; takes minutes more",
        ),
    ] = False,
) -> None:
    """Measure a model on a text for some minutes, and recommend a budget."""
    from saap import hf
    from saap.methods import find_method

    from .. import advise as measure
    from .. import by_weight as weights
    from .. import corpus as texts_of
    from .. import reference
    from ..checks import ORACLES
    from ..run import check_contexts
    from .decode import load
    from .progress import one_bar

    if not 0 < error <= 2:
        raise ValueError(f"--error must be above 0 and at most 2; got {error}")
    if not 1 <= texts <= 64:
        raise ValueError(f"--texts must be in 1..64; got {texts}")
    if by_weight and texts < 2:
        raise ValueError(
            "--by-weight needs --texts of at least 2, one to judge what the others taught; got 1"
        )
    if find_method(method).is_exact or method in ORACLES:
        raise ValueError(
            f"--method must be one that chooses rows and that a decoder can run; got {method!r}"
        )
    loaded, tokenizer, trained = load(model, index)
    check_contexts((context,), hf.max_context(loaded), None)
    if by_weight:
        weights.check_follows(loaded, find_method(method)(trained))
    text = texts_of.read_corpus(corpus) if corpus else reference.split_held_out()[1]
    with one_bar("measure") as bar:
        found = measure.advise(
            loaded, tokenizer, text, context=context, n_texts=texts, target=error, method=method,
            index=trained, progress=bar,
        )  # fmt: skip
    print_advice(found, method, index)
    if by_weight and found.chosen is not None:
        with one_bar("by weight") as bar:
            better = weights.advise(
                loaded, tokenizer, text, context=context, n_texts=texts,
                method=find_method(method)(trained), budget=found.chosen.budget, progress=bar,
            )  # fmt: skip
        print_by_weight(better, method, index)


def print_by_weight(found, method: str, index: Path | None) -> None:
    from .terminal import console, plain_table

    names = (
        "max_tokens", "min_weight, all layers alike", "min_weight, layers by importance",
    )  # fmt: skip
    rows = [
        [name, f"{m.rows:,.0f}", f"{m.divergence:.4f}"]
        for name, m in zip(names, found, strict=True)
    ]
    console.print()
    plain_table("bounded by", ("a step's rows", "visited", "nats from dense"), rows)
    console.print(
        "Visited: per head and layer in the mean, sinks and window counted in. Nats: KL\n"
        "divergence of the next token's distribution, on a text that importance was not\n"
        "measured on.\n",
        highlight=False,
    )
    budget = found[-1].budget
    numbers = textwrap.fill(
        ", ".join(f"{x:g}" for x in budget.layer_importance), 84,
        initial_indent=" " * 12, subsequent_indent=" " * 12,
    )  # fmt: skip
    console.print(
        f"{call(method, index)}\n"
        f"        max_tokens={budget.max_tokens}, min_weight={budget.min_weight:g}, "
        f"window={budget.window}, layer_importance=(\n{numbers},\n        )))",
        highlight=False,
    )


def call(method: str, index: Path | None) -> str:
    loads = "" if index is None else f"saap.TrainedIndex.load({str(index)!r}), "
    return f"    saap.attached(model, {loads}method={method!r}, budget=saap.Budget("


def print_advice(found, method: str, index: Path | None) -> None:
    from ..report.page import cell
    from .terminal import console, plain_table

    rows = [
        [
            f"{m.share:.0%}", f"{m.budget.max_tokens:,}", f"{m.recall:.1%}",
            cell(m.needles_lost, "{:.2%}"), f"{m.error:.3f}", f"{m.step_ms:.1f}",
            f"{m.speedup:.2f}x",
        ]
        for m in found.measured
    ]  # fmt: skip
    head = ("visited", "max_tokens", "recall, middle", "needles lost", "output error",
            "ms per token", "dense")  # fmt: skip
    plain_table(f"{method} at {found.context:,} tokens", head, rows)
    console.print(
        f"Dense: {found.dense_ms:.1f} ms per token over the same cache, "
        f"{found.transformers_ms:.1f} ms with transformers' own.\n"
    )
    best = found.chosen
    if best is None:
        console.print(
            f"No share up to {found.measured[-1].share:.0%} has an output error of at most "
            f"{found.target:g}: stay dense at {found.context:,} tokens, or accept more (--error)."
        )
        return
    verdict = (
        f"{best.speedup:.2f} times as fast as dense: it pays at {found.context:,} tokens"
        if found.pays
        else f"{best.speedup:.2f} times as fast as dense: it does not pay at "
        f"{found.context:,} tokens; a longer context may"
    )
    layers = found.hard_layers
    dense = f", dense_layers={layers}" if layers else ""
    budget = best.budget
    console.print(f"[bold]{best.share:.0%} of the cache[/], {verdict}.\n", highlight=False)
    console.print(
        f"{call(method, index)}\n"
        f"        max_tokens={budget.max_tokens}, window={budget.window}{dense}))",
        highlight=False,
    )
    if layers:
        console.print(
            "\nThe named layers have output errors that stand out; they were not dense in the "
            "measurement.",
            highlight=False,
        )
