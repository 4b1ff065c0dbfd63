"""What the reference model is trained on, in which order: lengths grow, positions end consecutive."""

from dataclasses import dataclass

from .decoder import DecoderConfig
from .sequences import Mix


@dataclass(frozen=True)
class Stage:
    """`steps` optimiser steps on `batch` sequences of `length` bytes.

    With probability `jump` a sequence's positions are stretched by random gaps up to the model's
    full range, so that far distances are seen before long sequences are affordable.
    """

    name: str
    length: int
    batch: int
    steps: int
    mix: Mix
    jump: float = 0.0


@dataclass(frozen=True)
class Recipe:
    decoder: DecoderConfig
    stages: tuple[Stage, ...]
    matrix_lr: float = 0.02
    vector_lr: float = 3e-3
    warmup: int = 100
    decay_share: float = 0.25  # the last share of all steps over which the rate falls to zero
    seed: int = 0


CPU = Recipe(
    decoder=DecoderConfig(),
    stages=(
        Stage("160", 160, 48, 700, Mix(text=0.25, keys=0.4, copies=0.0, periods=0.35)),
        Stage("512", 512, 16, 1250, Mix(text=0.35, keys=0.4, copies=0.2, periods=0.05), jump=0.3),
        Stage("2k", 2048, 4, 500, Mix(text=0.35, keys=0.4, copies=0.25), jump=0.3),
        Stage("4k", 4096, 2, 300, Mix(text=0.35, keys=0.45, copies=0.2)),
        Stage("8k", 8192, 1, 500, Mix(text=0.3, keys=0.5, copies=0.2)),
    ),
)
