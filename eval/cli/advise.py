"""The command `saap advise`: how much of its cache a model should visit, and if that pays."""

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command()(advise)


def advise(
    model: Annotated[
        str, typer.Argument(help="folder, .gguf file, hub name, or reference, smollm2, ...")
    ],
    corpus: Annotated[
        list[Path] | None, typer.Option(help="text to measure on; shipped if not given")
    ] = None,
    context: Annotated[int, typer.Option(help="tokens of context")] = 8192,
    error: Annotated[
        float, typer.Option(help="output error of attention that is accepted, in the mean")
    ] = 0.1,
    method: Annotated[str, typer.Option(help="a name of `saap eval --methods`")] = "saap",
    index: Annotated[Path | None, typer.Option(help="file that `saap train` wrote")] = None,
    texts: Annotated[int, typer.Option(help="texts to measure")] = 2,
) -> None:
    """Measure a model on a text for some minutes, and recommend a budget."""
    from saap import hf

    from .. import advise as measure
    from .. import corpus as texts_of
    from .. import reference
    from ..run import check_contexts
    from .decode import load
    from .progress import one_bar

    if not 0 < error <= 2:
        raise ValueError(f"--error must be above 0 and at most 2; got {error}")
    if not 1 <= texts <= 64:
        raise ValueError(f"--texts must be in 1..64; got {texts}")
    loaded, tokenizer, trained = load(model, index)
    check_contexts((context,), hf.max_context(loaded), None)
    text = texts_of.read_corpus(corpus) if corpus else reference.split_held_out()[1]
    with one_bar("measure") as bar:
        found = measure.advise(
            loaded, tokenizer, text, context=context, n_texts=texts, target=error, method=method,
            index=trained, progress=bar,
        )  # fmt: skip
    print_advice(found, method, index)


def print_advice(found, method: str, index: Path | None) -> None:
    from .terminal import console, plain_table

    rows = [
        [
            f"{m.share:.0%}", f"{m.budget.max_tokens:,}", f"{m.recall:.1%}", f"{m.error:.3f}",
            f"{m.step_ms:.1f}", f"{m.speedup:.2f}x",
        ]
        for m in found.measured
    ]  # fmt: skip
    head = ("visited", "max_tokens", "recall, middle", "output error", "ms per token", "dense")
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
    loads = "" if index is None else f"saap.TrainedIndex.load({str(index)!r}), "
    console.print(f"[bold]{best.share:.0%} of the cache[/], {verdict}.\n", highlight=False)
    console.print(
        f"    saap.attached(model, {loads}method={method!r}, budget=saap.Budget(\n"
        f"        max_tokens={budget.max_tokens}, window={budget.window}{dense}))",
        highlight=False,
    )
    if layers:
        console.print(
            "\nThe named layers have output errors that stand out; they were not dense in the "
            "measurement.",
            highlight=False,
        )
