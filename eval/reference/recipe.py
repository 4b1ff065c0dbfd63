"""What the reference model is trained on, in which order: lengths grow."""

from dataclasses import dataclass

from .decoder import DecoderConfig
from .sequences import Mix


@dataclass(frozen=True)
class HeadReset:
    """Start head `head` of `layer` anew as a copy of `source` that looks `shift` tokens further.

    RoPE makes this exact: turning the queries of a head that attends to offset d by `-shift`
    positions makes it attend to `d + shift`. Both heads must share a KV head.
    """

    layer: int
    head: int
    source: int
    shift: int


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
    resets: tuple[HeadReset, ...] = ()


@dataclass(frozen=True)
class Recipe:
    decoder: DecoderConfig
    stages: tuple[Stage, ...]
    matrix_lr: float = 0.02
    vector_lr: float = 3e-3
    warmup: int = 100
    decay_share: float = 0.07  # the last share of all steps over which the rate falls to zero
    seed: int = 0


CPU = Recipe(
    decoder=DecoderConfig(),
    stages=(
        Stage("160", 160, 48, 700, Mix(text=0.25, keys=0.4, copies=0.0, periods=0.35)),
        Stage("512", 512, 16, 1250, Mix(text=0.35, keys=0.4, copies=0.2, periods=0.05), jump=0.3),
        Stage("2k", 2048, 4, 500, Mix(text=0.25, keys=0.55, copies=0.2), jump=0.3),
        Stage("4k", 4096, 2, 90, Mix(text=0.25, keys=0.55, copies=0.2)),
        Stage("1k", 1024, 8, 635, Mix(text=0.2, keys=0.65, copies=0.15), jump=0.3),
        Stage("256", 256, 32, 277, Mix(text=0.15, keys=0.35, copies=0.0, periods=0.5)),
        # After these steps layer 0 looked 0, 1 and 2 bytes back, so that a match saw two bytes:
        # names and keys that share two were confused. A head that only repeated others starts
        # anew at 3 back.
        Stage(
            "256, longer matches",
            256,
            32,
            200,
            Mix(text=0.15, keys=0.4, copies=0.0, periods=0.45),
            resets=(HeadReset(0, 3, source=2, shift=1),),
        ),
        Stage(
            "1k again",
            1024,
            8,
            150,
            Mix(text=0.2, keys=0.5, copies=0.2, periods=0.1),
            jump=0.3,
        ),
        Stage("4k again", 4096, 2, 60, Mix(text=0.25, keys=0.5, copies=0.2, periods=0.05)),
        Stage("8k", 8192, 1, 150, Mix(text=0.25, keys=0.5, copies=0.2, periods=0.05)),
        # Up to here the sentence was "amber=4821733": the "=" took the place of a letter in the
        # match, so two keys that began with the same two digits were confused.
        Stage("1k, last", 1024, 8, 240, Mix(text=0.3, keys=0.5, copies=0.15, periods=0.05)),
        Stage("4k, last", 4096, 2, 60, Mix(text=0.35, keys=0.45, copies=0.2)),
        Stage("8k, last", 8192, 1, 130, Mix(text=0.4, keys=0.4, copies=0.2)),
    ),
)
