"""The commands that decode with Saap: `saap prefill`, `saap ask`, `saap generate`."""

from pathlib import Path
from typing import Annotated

import typer

MOST_TOKENS = 10**7
Model = Annotated[
    str,
    typer.Argument(help="folder, .gguf file, Hugging Face hub name, or reference, smollm2, ..."),
]
Index = Annotated[
    Path | None,
    typer.Option(help="index that `saap train` wrote for the model; the method saap needs none"),
]
Method = Annotated[
    str, typer.Option(help="how rows of the cache are chosen: saap, quest, pq, ... or dense")
]
Document = Annotated[Path, typer.Argument(help="text file, or folder of text files")]
ContextFile = Annotated[Path, typer.Option(help="the context file to write")]
Chunk = Annotated[int, typer.Option(help="tokens read in one forward")]
KVDtype = Annotated[
    str,
    typer.Option(
        help="store keys and values as bfloat16, float16 or int8; default: the model's dtype"
    ),
]
PrefillVisited = Annotated[
    float | None,
    typer.Option(
        help="read long prompts sparsely: each token reads this share of the tokens before it"
    ),
]
Seed = Annotated[int, typer.Option(help="seed of random numbers", min=0, max=2**32 - 1)]
NumberOfTokens = Annotated[int, typer.Option("--tokens", help="most tokens to generate")]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        help="cached tokens that a step reads in each layer, besides the first and last ones"
    ),
]
Nprobe = Annotated[
    int | None,
    typer.Option(help="buckets that a step visits in each layer, for methods with buckets"),
]
TopP = Annotated[
    float | None,
    typer.Option(help="visit buckets until they hold this share of the predicted attention"),
]
MinWeight = Annotated[
    float | None,
    typer.Option(help="read only tokens whose predicted attention weight is at least this"),
]


def register(app: typer.Typer) -> None:
    app.command()(prefill)
    app.command(name="index", hidden=True, help="The old name of `saap prefill`.")(index_as_before)
    app.command()(ask)
    app.command()(generate)


def prefill(
    model: Model,
    document: Document,
    out: ContextFile,
    index: Index = None,
    method: Method = "saap",
    chunk: Chunk = 2048,
    kv_dtype: KVDtype = "",
    prefill_visited: PrefillVisited = None,
) -> None:
    """Read a document once, and write its KV cache to a file for `saap ask`."""
    import saap

    from .outputs import check_output
    from .progress import one_bar
    from .terminal import console

    if chunk < 1:
        raise ValueError(f"--chunk must be at least 1; got {chunk}")
    check_output(out, [model, document, index])
    held_as = dtype_named(kv_dtype) if kv_dtype else None
    sparse = prefill_budget(prefill_visited)
    loaded, tokenizer, trained = load(model, index)
    tokens = read_tokens(tokenizer, document, loaded)
    with saap.attached(
        loaded, trained, budget_of(trained), method=method, kv_dtype=held_as, prefill=sparse
    ) as saap_model:
        from saap.hf.text import read_document

        with one_bar("read") as bar:
            cache = read_document(
                saap_model,
                tokens,
                chunk=chunk,
                progress=lambda done, total: bar(f"{total:,} tokens", done, total),
            )
        out.parent.mkdir(parents=True, exist_ok=True)
        note = {} if index is None else {"index_file": str(index.resolve())}
        if sparse is not None:
            note["prefill_visited"] = prefill_visited
        saap_model.save_context(cache, tokens, out, note=note)
    read = "" if sparse is None else f", {cache.read_share:.1%} of the rows visited to read them"
    console.print(
        f"wrote {out}: {len(tokens):,} tokens, {out.stat().st_size / 1e6:,.0f} MB{read}",
        highlight=False,
    )


def index_as_before(
    model: Model,
    document: Document,
    out: ContextFile,
    index: Index = None,
    chunk: Chunk = 2048,
) -> None:
    """`saap index` for one more version: what it writes is a context, not an index."""
    typer.echo("saap: `saap index` is now `saap prefill`; the old name goes in 0.2", err=True)
    prefill(model, document, out, index, chunk=chunk)


def ask(
    model: Model,
    file: Annotated[Path, typer.Argument(help="file that `saap prefill` wrote")],
    question: Annotated[str, typer.Argument(help="text that follows the document")],
    index: Annotated[
        Path | None, typer.Option(help="the trained index of `saap prefill`, if it was moved")
    ] = None,
    tokens: NumberOfTokens = 64,
    max_tokens: MaxTokens = None,
    nprobe: Nprobe = None,
    top_p: TopP = None,
    min_weight: MinWeight = None,
) -> None:
    """Ask a question about a document that `saap prefill` has read, without reading it again."""
    import saap
    from saap import context_file
    from saap.hf.text import generate_text

    check_tokens(tokens)
    header, _ = context_file.read(file)
    if index is None and "index_file" in header:
        index = Path(header["index_file"])
    loaded, tokenizer, trained = load(model, index)
    budget = budget_of(trained, max_tokens, nprobe, top_p, min_weight)
    method = header["budget"].get("method", "saap")
    kv_dtype = header["budget"].get("kv_dtype")
    held_as = None if kv_dtype is None else dtype_named(str(kv_dtype))
    with saap.attached(loaded, trained, budget, method=method, kv_dtype=held_as) as saap_model:
        cache, document = saap_model.open_context(file)
        found = generate_text(
            loaded, tokenizer, joined(document, tokenizer, question), tokens, cache=cache,
            write=write,
        )  # fmt: skip
        tell(method, sum(cache.lengths), cache.visited_share, found)


def generate(
    model: Model,
    prompt_file: Annotated[Path, typer.Option(help="text to continue")],
    index: Index = None,
    method: Method = "saap",
    compare: Annotated[
        bool, typer.Option(help="also continue with dense attention, and say where both differ")
    ] = False,
    lossless: Annotated[
        bool,
        typer.Option(help="give the tokens of dense attention: draft sparsely, verify exactly"),
    ] = False,
    drafts: Annotated[
        int | None,
        typer.Option(
            help="with --lossless: most tokens drafted before a verification; if not given, 8"
        ),
    ] = None,
    prefill_visited: PrefillVisited = None,
    tokens: NumberOfTokens = 64,
    max_tokens: MaxTokens = None,
    nprobe: Nprobe = None,
    top_p: TopP = None,
    min_weight: MinWeight = None,
) -> None:
    """Continue a text; print context length, share of the cache that was read, and speed."""
    import saap
    from saap.hf import Verify
    from saap.hf.text import generate_text, read_document

    from .progress import one_bar
    from .terminal import console

    check_tokens(tokens)
    if drafts is not None and not lossless:
        raise ValueError(f"--drafts must be given beside --lossless; got {drafts} without it")
    verify = Verify(8 if drafts is None else drafts) if lossless else None
    sparse = prefill_budget(prefill_visited)
    if lossless and sparse is not None:
        raise ValueError(
            "--prefill-visited must not be given beside --lossless, which gives what dense "
            f"attention gives; got {prefill_visited}"
        )
    loaded, tokenizer, trained = load(model, index)
    prompt = read_tokens(tokenizer, prompt_file, loaded)
    budget = budget_of(trained, max_tokens, nprobe, top_p, min_weight)
    with saap.attached(
        loaded, trained, budget, method=method, verify=verify, prefill=sparse
    ) as saap_model:
        with one_bar("read") as bar:
            cache = read_document(
                saap_model,
                prompt[:-1],
                spare=tokens + 64,
                progress=lambda done, total: bar(f"{total:,} tokens", done, total),
            )
        found = generate_text(loaded, tokenizer, prompt, tokens, cache=cache, write=write)
        if lossless:
            tell_lossless(method, sum(cache.lengths), cache.pace.tally, found)
        else:
            tell(method, sum(cache.lengths), cache.visited_share, found)
    if compare:
        dense = generate_text(loaded, tokenizer, prompt, tokens, write=write)
        tell("dense", len(prompt) + len(dense.tokens), 1.0, dense)
        same = len(dense.tokens)
        for place, pair in enumerate(zip(found.tokens, dense.tokens, strict=False)):
            if pair[0] != pair[1]:
                same = place
                break
        console.print(f"[dim]same tokens: the first {same} of {len(dense.tokens)}[/]")


def prefill_budget(visited: float | None):
    from saap import PrefillBudget

    if visited is None:
        return None
    if not 0 < visited <= 1:
        raise ValueError(f"--prefill-visited must be above 0 and at most 1; got {visited}")
    return PrefillBudget(visited=visited)


def check_tokens(tokens: int) -> None:
    if not 1 <= tokens <= MOST_TOKENS:
        raise ValueError(f"--tokens must be at least 1 and at most {MOST_TOKENS:,}; got {tokens}")


def dtype_named(name: str):
    from saap.kv.checks import KV_DTYPES
    from saap.names import find_named

    return find_named("kv_dtype", name, KV_DTYPES)


def load(model: str, index: Path | None):
    from ..run import load_for_eval
    from .app import model_path

    return load_for_eval(model_path(model), index)


def read_tokens(tokenizer, path: Path, model):
    """The tokens of a text; warns where the model was not trained for so many."""
    from saap import hf

    from .. import corpus
    from ..tasks.answering import encode
    from .terminal import errors

    tokens = encode(tokenizer, corpus.read_corpus([path]))
    if len(tokens) < 2:
        raise ValueError(f"{path}: must have at least 2 tokens; got {len(tokens)}")
    if len(tokens) > hf.max_context(model):
        errors.print(
            f"[yellow]warning[/]: {len(tokens):,} tokens are more than the model's "
            f"max_position_embeddings={hf.max_context(model):,}"
        )
    return tokens


def joined(document, tokenizer, question: str):
    import torch

    from ..tasks.answering import encode

    asked = encode(tokenizer, question.encode(), special=False)
    if len(asked) == 0:
        raise ValueError("question must be a text that follows the document; got an empty one")
    return torch.cat([document, asked])


def budget_of(trained, max_tokens=None, nprobe=None, top_p=None, min_weight=None):
    """What was asked for, or the default; sinks and window as the index was trained."""
    from saap import Budget

    if max_tokens is nprobe is top_p is None:  # beside min_weight it is the most of a step
        max_tokens = Budget.default().max_tokens
    places = {} if trained is None else {n: trained.metadata[n] for n in ("n_sink", "window")}
    return Budget(
        nprobe=nprobe, max_tokens=max_tokens, top_p=top_p, min_weight=min_weight, **places
    )


def write(text: str) -> None:
    from .terminal import say

    say(text)


def tell(name: str, n_context: int, share: float, found) -> None:
    from .terminal import console

    console.print(
        f"\n[dim]{name}: {n_context:,} tokens of context, {share:.1%} of the cache visited, "
        f"{found.tokens_per_second:.1f} tokens/s[/]",
        highlight=False,
    )


def tell_lossless(name: str, n_context: int, tally, found) -> None:
    from .terminal import console

    console.print(
        f"\n[dim]{name}, lossless: {n_context:,} tokens of context, "
        f"{tally.accepted_per_verification:.1f} tokens per verification, "
        f"{tally.accepted} of {tally.drafted} drafts accepted, {tally.exact_steps} exact steps, "
        f"{found.tokens_per_second:.1f} tokens/s[/]",
        highlight=False,
    )
