"""Train the reference model: `python -m saap.eval.reference.train --out DIR`.

Checkpoints to DIR/checkpoint.pt every few minutes and continues from it when started again;
writes DIR/model.safetensors (float16) and DIR/log.jsonl.
"""

import argparse
import json
import math
import os
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from . import recipe as recipes
from .decoder import Decoder
from .sequences import SequenceMaker
from .text import read_sources


def learning_rate(step: int, total: int, recipe) -> float:
    """Warm-up, constant, linear decay; relative to the recipe's rates."""
    decay_steps = max(1, int(recipe.decay_share * total))
    return min((step + 1) / recipe.warmup, 1.0, (total - step) / decay_steps)


def make_optimizers(model, recipe):
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=recipe.matrix_lr, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=recipe.vector_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def make_positions(rng, batch: int, length: int, jump: float, longest: int) -> np.ndarray:
    positions = np.tile(np.arange(length), (batch, 1))
    for row in range(batch):
        if rng.random() < jump:
            cuts = np.sort(rng.integers(1, length, int(rng.integers(1, 9))))
            spare = rng.integers(0, longest - length)
            gaps = np.diff(
                np.sort(np.concatenate([[0, spare], rng.integers(0, spare + 1, len(cuts) - 1)]))
            )
            for cut, gap in zip(cuts, gaps, strict=True):
                positions[row, cut:] += gap
    return positions


def stage_of(step: int, stages) -> tuple[int, object]:
    """How many steps of its stage are done, and the stage."""
    for stage in stages:
        if step < stage.steps:
            return step, stage
        step -= stage.steps
    raise AssertionError("step beyond the recipe")


def save_atomically(state: dict, path: Path) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def train(
    recipe, out: Path, *, device: str, compile_model: bool, save_every: float = 120.0
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    corpus = np.frombuffer(b"\n".join(read_sources(held_out=False)), np.uint8)
    makers = SequenceMaker(corpus)
    model = Decoder(recipe.decoder).to(device)
    optimizers = make_optimizers(model, recipe)
    total = sum(stage.steps for stage in recipe.stages)
    step, seconds = 0, 0.0
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, seconds = state["step"], state["seconds"]
        print(f"continuing at step {step} of {total}", flush=True)
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{n_parameters / 1e6:.2f} M parameters, {len(corpus) / 1e6:.1f} MB of text", flush=True)
    loss_of = torch.compile(model.loss, dynamic=False) if compile_model else model.loss
    started = saved_at = time.time()
    window = []

    def save():
        save_atomically(
            {
                "model": model.state_dict(),
                "optimizers": [o.state_dict() for o in optimizers],
                "step": step,
                "seconds": seconds + time.time() - started,
            },
            checkpoint,
        )

    while step < total:
        done_of_stage, stage = stage_of(step, recipe.stages)
        if done_of_stage == 0:
            for reset in stage.resets:
                model.reset_head(**asdict(reset))
        rng = np.random.default_rng([recipe.seed, step])
        tokens, weights = makers.batch(rng, stage.batch, stage.length, stage.mix)
        positions = make_positions(
            rng, stage.batch, stage.length, stage.jump, recipe.decoder.max_position_embeddings
        )
        tokens, weights, positions = (
            torch.from_numpy(a).to(device) for a in (tokens, weights, positions)
        )
        with torch.autocast(device, torch.bfloat16):
            loss = loss_of(tokens, positions, weights)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"loss {loss.item()} at step {step}")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = learning_rate(step, total, recipe)
        for optimizer, base in zip(optimizers, (recipe.matrix_lr, recipe.vector_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        window.append(loss.item())
        if step % 50 == 0 or step == total:
            spent = seconds + time.time() - started
            record = {
                "step": step,
                "stage": stage.name,
                "loss": float(np.mean(window)),
                "seconds": spent,
            }
            window = []
            with open(out / "log.jsonl", "a") as log:
                log.write(json.dumps(record) + "\n")
            print(
                f"step {step}/{total}  {stage.name}  loss {record['loss']:.3f}  {spent:.0f} s",
                flush=True,
            )
        if time.time() - saved_at > save_every:
            save()
            saved_at = time.time()
    save()
    weights16 = {n: p.half().contiguous() for n, p in model.state_dict().items()}
    save_file(weights16, out / "model.safetensors", metadata={"format": "pt"})
    (out / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", default="CPU", help="a name in recipe.py")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()
    train(
        getattr(recipes, arguments.recipe),
        arguments.out,
        device=arguments.device,
        compile_model=arguments.compile,
    )


if __name__ == "__main__":
    main()
