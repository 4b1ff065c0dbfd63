"""The commands that make and show trained indexes: `saap train`, `saap info`."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from saap.budget import Budget

from .decode import Model, Seed


def register(app: typer.Typer) -> None:
    app.command()(train)
    app.command()(info)


def train(
    model: Model,
    corpus: Annotated[
        list[Path],
        typer.Option(
            help="text to train on: text, HTML or .jsonl file, folder, prose, prose2, code, or "
            "NAME[:CONFIG[:SPLIT]] of a Hugging Face dataset; may be repeated"
        ),
    ],
    out: Annotated[Path, typer.Option(help="the index file to write")],
    context: Annotated[int, typer.Option(help="tokens in each training sequence")] = 8192,
    texts: Annotated[int, typer.Option(help="how many sequences, spread over the corpus")] = 24,
    text_field: Annotated[
        str, typer.Option(help="name of the text field in .jsonl files and datasets")
    ] = "text",
    nlist: Annotated[
        int | None,
        typer.Option(help="buckets per KV head; if not given, chosen by the context length"),
    ] = None,
    router: Annotated[
        str, typer.Option(help="what scores buckets for a query: mlp, linear or centroid")
    ] = "mlp",
    window: Annotated[
        int, typer.Option(help="how many recent tokens are always visited")
    ] = Budget.window,
    steps: Annotated[int, typer.Option(help="optimisation steps of the router")] = 400,
    baselines: Annotated[
        bool, typer.Option(help="also train for methods to compare with: linear, kmeans-rope")
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(help="cpu or cuda; if not given, a GPU of its own for each process, if any"),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32 (default on a CPU), bfloat16 (default on a GPU) or float16"),
    ] = None,
    seed: Seed = 0,
) -> None:
    """Train an index for a model: partitions of keys, and routers, of all layers in one file.

    Works layer by layer. After a kill, the same command goes on where it was. Several processes
    (torchrun --no-python --nproc-per-node N saap train ...) share the layers.
    """
    from saap.training import Processes, TrainingOptions, train_file

    from .outputs import check_output
    from .progress import progress_bars
    from .terminal import console

    for name, value in (("context", context), ("texts", texts)):
        if value < 1:
            raise ValueError(f"--{name} must be at least 1; got {value}")
    options = TrainingOptions(
        nlist=nlist, router=router, seed=seed, window=window, steps=steps, baselines=baselines
    )
    check_output(out, [model, *corpus])
    loaded, training = load(
        model, corpus, options, context=context, texts=texts, text_field=text_field,
        device=device, dtype=dtype,
    )  # fmt: skip
    processes = Processes.from_environment()
    is_first = processes is None or processes.rank == 0
    if is_first:
        print_needs(training, out)
    with processes or nullcontext(), progress_bars() if is_first else nullcontext() as progress:
        train_file(loaded, training, out, progress=progress, processes=processes)
    if is_first:
        console.print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)", highlight=False)


def load(model, corpus, options, *, context, texts, text_field, device, dtype):
    """The model, and the `saap.training.Training` of it that was asked for."""
    from saap import hf
    from saap.training import prepare

    from .. import corpus as texts_of
    from .app import model_path

    enough = texts * context * texts_of.BYTES_A_TOKEN
    text = texts_of.read_corpus(corpus, text_field=text_field, enough=enough)
    device, dtype = placed(device, dtype)
    loaded = hf.load_model(model_path(model), device=device, dtype=dtype)
    if context > hf.max_context(loaded):
        raise ValueError(
            f"--context must be at most the model's max_position_embeddings="
            f"{hf.max_context(loaded)}; got {context}"
        )
    tokenizer = hf.load_tokenizer(model_path(model))
    return loaded, prepare(loaded, texts_of.sequences(tokenizer, text, context, texts), options)


def placed(device: str | None, dtype: str | None):
    """Device and dtype: this process's GPU in bfloat16 where there is one, else float32."""
    import os

    import torch

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype is not None and dtype not in dtypes:
        raise ValueError(f"--dtype must be one of {', '.join(dtypes)}; got {dtype}")
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda; got {kind}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device must be cpu when there is no GPU that torch can use; got cuda")
    if kind == "cuda":
        kind = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
        torch.cuda.set_device(kind)
    return kind, dtypes[dtype or ("bfloat16" if kind.startswith("cuda") else "float32")]


def print_needs(training, out: Path) -> None:
    """What the training takes, and what it goes on from."""
    from saap.training import work_folder_of

    from .terminal import console

    needed, work = training.memory, work_folder_of(out)
    console.print(
        f"[dim]memory[/]  {needed.layer / 1e9:.2f} GB beside the model, whatever its depth; "
        f"{2 * needed.hidden / 1e9:.2f} GB of disk in {work}, until the end",
        highlight=False,
    )
    finished = len(list(work.glob("layer-*.safetensors"))) if work.is_dir() else 0
    if finished:
        layers = training.description["num_layers"]
        console.print(f"[dim]going on[/]  {finished} of {layers} layers are finished")


def info(
    file: Annotated[Path, typer.Argument(help="index file that `saap train` wrote")],
    router: Annotated[
        str | None, typer.Option(help="router whose recall is shown; if not given, the default")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="write the map to this picture: PNG, SVG, ...")
    ] = None,
) -> None:
    """Show what an index file holds, and a map of each head's recall, measured in training."""
    from saap.trained_index import TrainedIndex

    from ..info import check_router, print_index

    if plot is not None:
        check_picture(plot, file)
    index = TrainedIndex.load(file)
    router = check_router(index, router)
    print_index(file, index, router)
    if plot is not None:
        from ..report.quality_map import quality_map
        from .terminal import console

        console.print(f"wrote {quality_map(index, router, plot)}", highlight=False)


def check_picture(path: Path, index: Path) -> None:
    """ValueError for a name that no picture can have; without a suffix it is a PNG."""
    from ..report.plots import picture_format
    from .outputs import check_output

    check_output(path, [index])
    picture_format(path)
