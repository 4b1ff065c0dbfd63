"""Batches of a recipe by their step, made in processes beside the training where it asks so."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from saap.eval.reference.sequences import SequenceMaker

from .recipe import Recipe, Stage


class Batch(NamedTuple):
    """`tokens int16 [B, T + 1], weights float32 [B, T + 1], positions int32 [B, T]`."""

    tokens: Tensor
    weights: Tensor
    positions: Tensor

    def on(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, positions and weights as `Decoder.loss` takes them."""
        tokens, weights, positions = (t.to(device, non_blocking=True) for t in self)
        return tokens.long(), positions, weights


class Batches(Dataset):
    """The batch of a step depends on the recipe's seed and the step alone."""

    def __init__(self, recipe: Recipe, corpus: bytes):
        self.recipe = recipe
        self.makers = SequenceMaker(np.frombuffer(corpus, np.uint8))

    def __getitem__(self, step: int) -> Batch:
        _, stage = stage_of(step, self.recipe.stages)
        rng = np.random.default_rng([self.recipe.seed, step])
        tokens, weights = self.makers.batch(rng, stage.batch, stage.length, stage.mix)
        longest = self.recipe.decoder.max_position_embeddings
        positions = make_positions(rng, stage.batch, stage.length, stage.jump, longest)
        return Batch(
            torch.from_numpy(tokens.astype(np.int16)),
            torch.from_numpy(weights),
            torch.from_numpy(positions.astype(np.int32)),
        )


def batches_from(dataset: Batches, step: int, device: str) -> Iterable[Batch]:
    """The batches of `step` and all after it, in order."""
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=range(step, dataset.recipe.total_steps),
        num_workers=dataset.recipe.workers,
        pin_memory=device.startswith("cuda"),
        prefetch_factor=2 if dataset.recipe.workers else None,
    )


def stage_of(step: int, stages: tuple[Stage, ...]) -> tuple[int, Stage]:
    """How many steps of its stage are done, and the stage."""
    for stage in stages:
        if step < stage.steps:
            return step, stage
        step -= stage.steps
    raise AssertionError("step beyond the recipe")


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
