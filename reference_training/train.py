"""Train the reference model: `python -m reference_training.train --out DIR`.

Checkpoints to DIR in files of under 16 MB, and continues from there when started again. With
`--seconds` it stops in time, saves and ends with exit code 0. When all steps are done it writes
DIR/model.safetensors (float16) in their place. DIR/log.jsonl grows on the way.
`--plan` prints what the recipe costs and ends.
"""

import argparse
import contextlib
import json
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn.attention import sdpa_kernel

from saap.eval.source_text import find_sources, training_text

from . import checkpoint, plan
from .batches import Batch, Batches, batches_from, stage_of
from .decoder import Decoder
from .recipe import RECIPES, Recipe, find_recipe

COMPILE_S, SAVE_S = 60.0, 10.0  # left free before a stage's first step, and at the end


def learning_rate(step: int, total: int, recipe: Recipe) -> float:
    """Warm-up, constant, linear decay; relative to the recipe's rates."""
    decay_steps = max(1, int(recipe.decay_share * total))
    return min((step + 1) / recipe.warmup, 1.0, (total - step) / decay_steps)


def make_optimizers(model, recipe: Recipe):
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=recipe.matrix_lr, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=recipe.vector_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def read_corpus(recipe: Recipe) -> tuple[bytes, list[dict]]:
    """The text to train on, and what it is made of; tells on standard error what is missing."""
    sources, missing = find_sources(recipe.sources)
    for name in missing:
        print(f"{name} is not installed: trained without its text", file=sys.stderr, flush=True)
    named = [{"name": s.name, "version": s.version, "licence": s.licence} for s in sources]
    return training_text(sources, drop_copies=recipe.drop_copies), named


class Run:
    """A model in training: its recipe, weights, optimisers, and the steps it has taken."""

    def __init__(self, recipe: Recipe, device: str, *, compile_model: bool, attention: str):
        torch.manual_seed(recipe.seed)
        self.recipe, self.device = recipe, device
        self.compiled, self.attention = compile_model, attention
        self.model = Decoder(recipe.decoder).to(device)
        self.optimizers = make_optimizers(self.model, recipe)
        self.step, self.seconds = 0, 0.0
        if compile_model:
            # One graph for all layers: a stage's new shape is compiled once, not six times.
            for layer in self.model.model.layers:
                layer.compile(dynamic=False)

    def take_step(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and share of answers right, left on the device: reading them would wait for it."""
        recipe, total = self.recipe, self.recipe.total_steps
        done_of_stage, stage = stage_of(self.step, recipe.stages)
        if done_of_stage == 0:
            for reset in stage.resets:
                self.model.reset_head(**asdict(reset))
        with (
            flash_only(self.device, self.attention),
            torch.autocast(self.device.split(":")[0], torch.bfloat16),
        ):
            loss, answered = self.model.loss(*batch.on(self.device))
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        rate = learning_rate(self.step, total, recipe)
        bases = recipe.matrix_lr, recipe.vector_lr
        for optimizer, base in zip(self.optimizers, bases, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.detach(), answered

    def save(self, folder: Path, *, finished: bool = False) -> None:
        """A checkpoint; one that is `finished` holds no tensors."""
        tensors = {}
        if not finished:
            weights, states = self.recipe.saved_weights, self.recipe.saved_states
            types = getattr(torch, weights), getattr(torch, states)
            tensors = checkpoint.pack(self.model, self.optimizers, *types)
        checkpoint.save_parts(
            folder,
            tensors,
            {
                "step": self.step,
                "seconds": round(self.seconds, 1),
                "finished": finished,
                "recipe": as_plain(self.recipe),
            },
        )

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint; ValueError when it is of another recipe."""
        tensors, header = checkpoint.load_parts(folder)
        if header["recipe"] != as_plain(self.recipe):
            own, saved = as_plain(self.recipe), header["recipe"]
            changed = [name for name in own if saved.get(name) != own[name]]
            raise ValueError(
                f"{folder}: must be empty or hold a checkpoint of the same recipe and --scale; "
                "got "
                f"one of a recipe with other {', '.join(changed)}"
            )
        if not header["finished"]:
            checkpoint.unpack(tensors, self.model, self.optimizers)
        self.step, self.seconds = header["step"], header["seconds"]


def as_plain(recipe: Recipe) -> dict:
    """As it comes back from a JSON file."""
    return json.loads(json.dumps(asdict(recipe)))


def flash_only(device: str, attention: str):
    """At long lengths any other attention would take all memory: rather an error than that."""
    if not device.startswith("cuda"):
        return contextlib.nullcontext()
    return sdpa_kernel(plan.BACKENDS[attention])


class Log:
    """Collects losses; reads them from the device, and checks them, when a line is written."""

    def __init__(self, path: Path):
        self.path = path
        self.pending: list[tuple[torch.Tensor, torch.Tensor]] = []

    def drain(self, step: int) -> tuple[float, float] | None:
        """Mean loss and share of answers right since the last; FloatingPointError for NaN."""
        if not self.pending:
            return None
        loss, answered = (torch.stack(t).float() for t in zip(*self.pending, strict=True))
        if not torch.isfinite(loss).all():
            raise FloatingPointError(f"a loss of {loss.tolist()[-5:]} by step {step}")
        self.pending = []
        return float(loss.mean()), float(answered.nanmean())

    def write(self, run: Run, stage_name: str, seconds: float) -> None:
        loss, answered = self.drain(run.step)
        record = {"step": run.step, "stage": stage_name, "loss": loss, "seconds": seconds}
        answers = ""
        if not math.isnan(answered):
            record["answers"] = round(answered, 4)
            answers = f"  answers {answered:.1%}"
        with open(self.path, "a") as log:
            log.write(json.dumps(record) + "\n")
        print(
            f"step {run.step}/{run.recipe.total_steps}  {stage_name}  loss {loss:.3f}"
            f"{answers}  {seconds:.0f} s",
            flush=True,
        )


def train(
    recipe: Recipe,
    out: Path,
    *,
    device: str,
    compile_model: bool,
    attention: str = "flash",
    seconds: float | None = None,
    save_every: float = 120.0,
) -> bool:
    """Train until all steps are done (True) or `seconds` are over (False), from where `out` is."""
    begin = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    run = Run(recipe, device, compile_model=compile_model, attention=attention)
    total = recipe.total_steps
    if checkpoint.has_checkpoint(out):
        run.load(out)
        print(f"continuing at step {run.step} of {total}", flush=True)
    if run.step == total:
        return True
    corpus, sources = read_corpus(recipe)
    n_parameters = sum(p.numel() for p in run.model.parameters())
    print(f"{n_parameters / 1e6:.2f} M parameters, {len(corpus) / 1e6:.1f} MB of text", flush=True)
    named = {"sources": sources, "bytes": len(corpus)}
    (out / "corpus.json").write_text(json.dumps(named, indent=1) + "\n")
    log, before, saved_at, slowest = Log(out / "log.jsonl"), run.seconds, begin, 0.0
    forget_after(log.path, run.step)
    for batch in batches_from(Batches(recipe, corpus), run.step, device):
        done_of_stage, stage = stage_of(run.step, recipe.stages)
        now = time.monotonic()
        reserve = SAVE_S + 2 * slowest + (COMPILE_S if done_of_stage == 0 and compile_model else 0)
        if seconds is not None and now - begin + reserve > seconds:
            break
        if now - saved_at > save_every:
            log.drain(run.step)
            run.save(out)
            saved_at = time.monotonic()
        log.pending.append(run.take_step(batch))
        run.seconds = before + time.monotonic() - begin
        slowest = 0.0 if done_of_stage < 3 else max(slowest, time.monotonic() - now)
        if run.step % recipe.log_every == 0 or run.step == total:
            log.write(run, stage.name, run.seconds)
    log.drain(run.step)
    if run.step == total:
        finish(run, out)
        return True
    run.save(out)
    print(
        f"stopped at step {run.step} of {total} after {time.monotonic() - begin:.0f} s; the same "
        "command continues from there",
        flush=True,
    )
    return False


def forget_after(path: Path, step: int) -> None:
    """Drop log lines of steps that a killed run took and that are about to be taken again."""
    if path.exists():
        lines = path.read_text().splitlines()
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        path.write_text("".join(f"{line}\n" for line in kept))


def finish(run: Run, out: Path) -> None:
    weights16 = {n: p.half().cpu().contiguous() for n, p in run.model.state_dict().items()}
    save_file(weights16, out / "model.safetensors", metadata={"format": "pt"})
    (out / "recipe.json").write_text(json.dumps(as_plain(run.recipe), indent=1))
    run.save(out, finished=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the run")
    parser.add_argument("--recipe", default="CPU", help=", ".join(RECIPES))
    parser.add_argument("--scale", type=float, default=1.0, help="times the recipe's steps")
    parser.add_argument("--seconds", type=float, help="stop and save before that many have passed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--attention", choices=plan.BACKENDS, default="flash", help="on a GPU")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--plan", action="store_true", help="print what it costs, and end")
    parser.add_argument(
        "--rates", help="for --plan, as 400,280,4000; measured on a GPU if not given"
    )
    options = parser.parse_args()
    try:
        recipe = find_recipe(options.recipe).scaled(options.scale)
        if options.plan:
            print(plan.table(recipe, rates_for(recipe, options.rates, options.device)))
            return
        if options.out is None:
            raise ValueError("--out must be the folder of the run; got none")
        train(
            recipe,
            options.out,
            device=options.device,
            compile_model=options.compile,
            attention=options.attention,
            seconds=options.seconds,
        )
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"reference_training.train: {error}", file=sys.stderr)
        sys.exit(2)


def rates_for(recipe: Recipe, given: str | None, device: str) -> plan.Rates:
    if given is not None:
        return plan.parse_rates(given)
    if device.startswith("cuda"):
        return plan.measure_rates(recipe, device)[0]
    return plan.ASSUMED_H200


if __name__ == "__main__":
    main()
