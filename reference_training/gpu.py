"""The long reference model in one sitting: `python -m reference_training.gpu RUN`, until it says
that all is done.

Each call goes on where the one before ended and is over within `--seconds`: measure the device and
fit the recipe to `--budget` seconds of training; train; add what libraries need to load the model;
judge it densely; train an index and compare methods at each context. What is in RUN is also put
into `--out`, or `$OUT`, as a tar file in parts of under 16 MB (`cat run.tar.* | tar x`).
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import torch

from saap.eval.reference import split_held_out
from saap.eval.reference.sequences import Mix, SequenceMaker

from . import checkpoint, export, judge, plan
from .batches import Batches
from .recipe import RECIPES, Recipe, find_recipe
from .train import Run, read_corpus, train

CONTEXTS = (8192, 32768, 131072)
METHODS = (
    "dense", "oracle", "random", "streaming", "kmeans-rope", "kmeans", "linear", "mlp",
    "kmeans-cells", "saap",
)  # fmt: skip
BUDGETS = (0.04, 0.05, 0.075, 0.1, 0.2)  # the window alone takes 1/32
N_INDEX_TEXTS, TIMED_STEPS = 12, 3
N_TEXTS, N_PROMPTS = 4, 10
LEAST_S = 20.0  # a step is not begun with less
NOT_CARRIED = (".tmp", ".png")


class OutOfTime(Exception):
    """What is left is done by the next call."""


def steps_of(recipe: Recipe) -> list[str]:
    contexts = [c for c in CONTEXTS if c <= recipe.decoder.max_position_embeddings]
    return ["plan", "train", "complete", "judge", *(f"context-{c}" for c in contexts)]


def is_done(step: str, run: Path) -> bool:
    if step == "train":
        manifest = run / checkpoint.MANIFEST
        return manifest.is_file() and json.loads(manifest.read_text())["finished"]
    name, _, context = step.partition("-")
    marks = {
        "plan": "plan.json",
        "complete": "held_out.txt.xz",
        "judge": "judged.json",
        "context": f"results-{context}/scores.json",
    }
    return (run / marks[name]).is_file()


def measure(recipe: Recipe, run: Path, options) -> None:
    """Rates, seconds of a step of each stage, and the scale that fits the budget."""
    rates, attention = plan.measure_rates(recipe, options.device)
    print(plan.table(recipe, rates), flush=True)
    corpus, _ = read_corpus(recipe)
    batches = Batches(recipe, corpus)
    trial = Run(recipe, options.device, compile_model=options.compile, attention=attention)
    seconds_a_step, first = {}, 0
    for stage in recipe.stages:

        def step(first=first, batch=batches[first]):
            trial.step = first
            trial.take_step(batch)

        begin = time.monotonic()
        step()
        plan.synchronize(options.device)
        print(f"{stage.name}: first step {time.monotonic() - begin:.1f} s", flush=True)
        seconds_a_step[stage.name] = plan.seconds_of(step, options.device, TIMED_STEPS)
        first += stage.steps
    total = sum(seconds_a_step[s.name] * s.steps for s in recipe.stages)
    scale = round(min(3.0, options.budget / total), 3)
    print(plan.table(recipe.scaled(scale), rates, seconds_a_step), flush=True)
    print(f"scale {scale}: {options.budget:.0f} s of training", flush=True)
    peak = torch.cuda.max_memory_allocated() / 1e9 if options.device.startswith("cuda") else None
    report = {
        "device": torch.cuda.get_device_name() if peak is not None else "cpu",
        "torch": torch.__version__,
        "rates": vars(rates),
        "attention": attention,
        "seconds_a_step": seconds_a_step,
        "floor_s": {s.name: plan.cost(s, recipe.decoder).floor_s(rates) for s in recipe.stages},
        "peak_gb": peak,
        "scale": scale,
    }
    (run / "plan.json").write_text(json.dumps(report, indent=1) + "\n")


def compare(run: Path, context: int, device: str) -> None:
    """An index trained at `context`, and all methods judged there."""
    from saap import hf
    from saap.eval.report.page import make_report
    from saap.eval.run import EvalConfig
    from saap.eval.run import run as evaluate
    from saap.trained_index import TrainedIndex
    from saap.training import train as train_index

    training_text, text = split_held_out(run)
    model, tokenizer = hf.load_model(run, device=device), hf.load_tokenizer(run)
    path = run / f"index-{context}.safetensors"
    if not path.is_file():
        makers = SequenceMaker(np.frombuffer(training_text, np.uint8))
        mix = Mix(text=0.5, keys=0.2, medley=0.3)
        rng = np.random.default_rng(context)
        tokens, _ = makers.batch(rng, N_INDEX_TEXTS, context - 1, mix)
        train_index(model, torch.from_numpy(tokens), baselines=True, progress=told).save(path)
    config = EvalConfig(
        methods=METHODS,
        contexts=(context,),
        budgets=BUDGETS,
        n_texts=N_TEXTS,
        n_prompts=N_PROMPTS,
    )
    results, index = run / f"results-{context}", TrainedIndex.load(path)
    evaluate(model, tokenizer, index, text, config, results, model_name="reference", progress=told)
    make_report(results)


def told(what: str, done: int, total: int) -> None:
    if done % max(1, total // 4) == 0:
        print(f"{what} {done}/{total}", flush=True)


def take(step: str, run: Path, options) -> None:
    """One step, in this process. Raises OutOfTime when it saved and has more to do."""
    recipe, planned = find_recipe(options.recipe), {}
    if (run / "plan.json").is_file():
        planned = json.loads((run / "plan.json").read_text())
    name, _, context = step.partition("-")
    if name == "plan":
        measure(recipe, run, options)
    elif name == "train":
        done = train(
            recipe.scaled(planned["scale"]),
            run,
            device=options.device,
            compile_model=options.compile,
            attention=planned["attention"],
            seconds=options.seconds,
        )
        if not done:
            raise OutOfTime
    elif name == "complete":
        export.complete(run, recipe)
    elif name == "judge":
        found = judge.judge(run, options.device, planned["attention"], options.share)
        (run / "judged.json").write_text(json.dumps(found, indent=1) + "\n")
    else:
        compare(run, int(context), options.compare_device)


def take_apart(step: str, run: Path, options, left_s: float) -> None:
    """One step in a process of its own: its memory is free again, and it can be stopped."""
    command = [sys.executable, "-m", "reference_training.gpu", str(run), "--only", step]
    command += ["--recipe", options.recipe, "--seconds", str(left_s), "--device", options.device]
    command += ["--budget", str(options.budget), "--compare-device", options.compare_device]
    command += ["--share", str(options.share)] + ([] if options.compile else ["--no-compile"])
    try:
        code = subprocess.run(command, timeout=left_s).returncode
    except subprocess.TimeoutExpired:
        raise OutOfTime from None
    if code == 3:
        raise OutOfTime
    if code:
        raise RuntimeError(f"{step} ended with exit code {code}")


def collect(run: Path, out: Path) -> list[Path]:
    """All of `run` in `out`, as parts of one tar file; parts of an earlier call are replaced."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("run.tar.*"):
        old.unlink()
    whole = out / "run.tar"
    with tarfile.open(whole, "w") as archive:
        for path in sorted(run.rglob("*")):
            if path.is_file() and path.suffix not in NOT_CARRIED:
                archive.add(path, path.relative_to(run.parent))
    parts = []
    with open(whole, "rb") as content:
        while piece := content.read(checkpoint.PART_BYTES):
            parts.append(out / f"run.tar.{len(parts) + 1}")
            parts[-1].write_bytes(piece)
    whole.unlink()
    return parts


def sitting(run: Path, options) -> int:
    """All steps that are left, while there is time. 0: done, or to be continued; 1: one broke."""
    begin = time.monotonic()
    run.mkdir(parents=True, exist_ok=True)
    if importlib.util.find_spec("faiss") is None:
        print("FAISS is not installed: the steps context-N need it and will end with that error")
    broken = 0
    for step in steps_of(find_recipe(options.recipe)):
        if is_done(step, run):
            continue
        left_s = options.seconds - (time.monotonic() - begin) - options.collect_s
        print(f"== {step}, {left_s:.0f} s left", flush=True)
        try:
            if left_s < LEAST_S:
                raise OutOfTime
            take_apart(step, run, options, left_s)
        except OutOfTime:
            print(f"stopped in {step}: the same command goes on from there", flush=True)
            break
        except RuntimeError as error:
            print(error, flush=True)
            broken = 1
            if not step.startswith("context"):
                break
    else:
        print("all steps are done" if not broken else "all steps were tried", flush=True)
    if options.out is not None:
        for part in collect(run, options.out):
            print(f"wrote {part} ({part.stat().st_size / 1e6:.1f} MB)", flush=True)
    print(f"{time.monotonic() - begin:.0f} s", flush=True)
    return broken


def parse(arguments: list[str] | None) -> argparse.Namespace:
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the run")
    out = os.environ.get("OUT")
    parser.add_argument("--out", type=Path, default=out and Path(out), help="for the tar file")
    parser.add_argument("--seconds", type=float, default=560.0, help="that this call may take")
    parser.add_argument("--budget", type=float, default=900.0, help="seconds of all training")
    parser.add_argument("--recipe", default="GPU", help=", ".join(RECIPES))
    parser.add_argument("--device", default=cuda)
    parser.add_argument("--compare-device", default=cuda, help="for index and comparison")
    parser.add_argument("--share", type=float, default=1.0, help="of the dense prompts")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--only", help="one step, here and now")
    parser.set_defaults(collect_s=10.0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        if options.only is None:
            return sitting(options.run, options)
        take(options.only, options.run, options)
        return 0
    except OutOfTime:
        return 3
    except (ValueError, ImportError, FloatingPointError, OSError) as error:
        print(f"reference_training.gpu: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
