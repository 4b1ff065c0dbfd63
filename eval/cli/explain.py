"""The command `saap explain`: where a prompt's last token looks, and which methods visit it."""

from pathlib import Path
from typing import Annotated

import typer

from .decode import Index, Model

WIDTH = 44


def register(app: typer.Typer) -> None:
    app.command()(explain)


def explain(
    model: Model,
    prompt_file: Annotated[Path, typer.Option(help="text file that holds the prompt")],
    passage: Annotated[
        str | None,
        typer.Option(
            help="words of the prompt: list the heads that look at them; if not given, at the "
            "passage with most attention"
        ),
    ] = None,
    methods: Annotated[
        str, typer.Option(help="names, separated by commas")
    ] = "oracle-tokens,saap,pq,quest,streaming",
    budget: Annotated[float, typer.Option(help="share of the context that is visited")] = 0.05,
    index: Index = None,
) -> None:
    """Show which passages of a prompt its last token looks at, and which methods find them."""
    from saap import hf
    from saap.methods import METHODS, find_method

    from .. import corpus
    from .. import explain as explained
    from ..run import check_contexts
    from ..variants import make_variants
    from .app import choose
    from .decode import load
    from .terminal import console

    prompt = corpus.read_file(prompt_file).decode(errors="replace")
    if passage is not None and not passage.strip():
        raise ValueError("--passage must be words of the prompt; got none")
    names = choose(methods, tuple(n for n, m in METHODS.items() if index or not m.needs_index))
    for name in names:
        find_method(name)
    loaded, tokenizer, trained = load(model, index)
    variants = make_variants(names, trained, 0)
    n = len(tokenizer(prompt)["input_ids"])
    check_contexts((n,), hf.max_context(loaded), None)
    with console.status(f"reading {n:,} tokens"):
        found = explained.explain(
            loaded, tokenizer, prompt, variants, share=budget, passage=passage
        )
    print_explanation(found, [variant.label for variant in variants])


def print_explanation(found, methods: list[str]) -> None:
    from .terminal import console, plain_table

    def shares(of: dict[str, float]) -> list[str]:
        return [f"{of[name]:.0%}" for name in methods]

    console.print(
        f"{found.context:,} tokens, {found.rows:,} rows visited per head. {found.middle_mass:.1%} "
        "of the attention is between the first tokens and the recent window.\n",
        highlight=False,
    )
    rows = [["all of these tokens", f"{found.middle_mass:.1%}", *shares(found.found)]]
    for passage in found.passages:
        text = " ".join(passage.text.split())
        text = text if len(text) <= WIDTH else text[: WIDTH - 1] + "…"
        rows.append([text, f"{passage.mass:.2%}", *shares(passage.found)])
    plain_table("passages, and how much of it is found", ("", "attention", *methods), rows)
    heads = [
        [f"layer {h.layer}, head {h.head}", f"{h.mass:.1%}", f"{h.rank:,}", *shares(h.found)]
        for h in found.heads
    ]
    console.print()
    title = "heads that look at the first passage most; rank of its best token"
    plain_table(title, ("", "attention", "rank", *methods), heads)
