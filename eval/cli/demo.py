"""`saap demo`: train an index for the reference model, compare methods, make the report."""

from pathlib import Path

import numpy as np
import torch

from saap import hf
from saap.training import train

from .. import reference
from ..reference.sequences import Mix, SequenceMaker
from ..report.page import main_budget, make_report
from ..run import EvalConfig, run
from ..scores import read_scores
from .progress import one_bar, progress_bars
from .terminal import console, print_scores

METHODS = (
    "dense", "oracle-tokens", "oracle", "streaming", "kmeans-rope", "kmeans", "linear", "mlp",
    "kmeans-cells", "blend", "pq", "saap",
)  # fmt: skip
N_TRAINING_TEXTS = 24


def training_sequences(text: bytes, context: int, seed: int) -> torch.Tensor:
    """Token ids `[n, context]` for the reference model, half of the sequences with pass keys.

    Routers learn from the queries that a model is asked to answer; names and digits are random.
    """
    makers = SequenceMaker(np.frombuffer(text, np.uint8))
    mix = Mix(text=0.5, keys=0.5, copies=0.0)
    tokens, _ = makers.batch(np.random.default_rng(seed), N_TRAINING_TEXTS, context - 1, mix)
    return torch.from_numpy(tokens)


def demo(out: Path, context: int, seed: int) -> None:
    """Everything from the shipped model to the report, in `out`. Continues what is there."""
    model = hf.load_model(reference.FOLDER)
    tokenizer = hf.load_tokenizer(reference.FOLDER)
    training_text, evaluation_text = reference.split_held_out()
    out.mkdir(parents=True, exist_ok=True)
    console.print(
        f"[bold]Reference model[/]: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M "
        f"parameters, bytes, trained to {reference.CONTEXT:,} tokens. "
        f"{torch.get_num_threads()} threads."
    )
    console.print(
        f"\n[bold]1. Train an index[/] on {N_TRAINING_TEXTS} texts of {context:,} tokens, "
        "half of them with pass keys"
    )
    sequences = training_sequences(training_text, context, seed)
    with progress_bars() as progress:
        index = train(model, sequences, seed=seed, baselines=True, progress=progress)
    index.save(out / "index.safetensors")

    console.print(f"\n[bold]2. Compare {len(METHODS)} methods[/] on text that neither has seen")
    config = EvalConfig(
        methods=METHODS,
        contexts=(context,),
        budgets=(0.04, 0.05, 0.075, 0.1, 0.2),
        seed=seed,
    )
    results = out / "results"
    with one_bar("evaluate") as progress:
        run(
            model,
            tokenizer,
            index,
            evaluation_text,
            config,
            results,
            model_name="reference",
            progress=progress,
        )

    report = make_report(results)
    scores = read_scores(results)
    console.print()
    print_scores(scores, context, main_budget(scores))
    console.print(
        f"\nreport  {report}\nscores  {results / 'scores.json'}"
        f"\nindex   {out / 'index.safetensors'}"
    )
