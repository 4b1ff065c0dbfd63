"""What the reference model is trained on, in which order: lengths grow."""

from dataclasses import dataclass, replace

from saap.eval.reference.sequences import Mix
from saap.eval.source_text import PACKAGES, STDLIB

from .decoder import DecoderConfig


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
    sources: tuple[str, ...] = (STDLIB,)
    drop_copies: bool = False  # leave out training files whose text a held-out file repeats
    log_every: int = 50
    workers: int = 0  # processes that make batches; 0: the training process makes its own
    saved_weights: str = "float32"  # of checkpoints, as the next
    saved_states: str = "float32"

    def scaled(self, scale: float) -> "Recipe":
        """The same with `scale` times the steps in every stage, at least one."""
        if not 0 < scale <= 100:
            raise ValueError(f"scale must be above 0 and at most 100; got {scale}")
        stages = (replace(s, steps=max(1, round(scale * s.steps))) for s in self.stages)
        return replace(self, stages=tuple(stages))

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)


def find_recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}; got {name!r}")
    return RECIPES[name]


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

LONG = Mix(text=0.3, medley=0.45, named=0.1, chains=0.1, keys=0.05)

# Every position is consecutive, and every stage but the shortest ones sees 131,072 bytes a step.
# RoPE base: with 1e7, 7 of 32 pairs turn by less than half a radian over 131,072 positions, so
# that what is far can be matched by content; with 1e6 there would be 3.
GPU = Recipe(
    decoder=DecoderConfig(
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        rope_theta=1e7,
        max_position_embeddings=131072,
    ),
    stages=(
        Stage("256", 256, 256, 700, Mix(text=0.2, keys=0.35, copies=0.1, periods=0.35)),
        Stage(
            "512",
            512,
            128,
            700,
            Mix(text=0.2, keys=0.2, copies=0.1, periods=0.1, named=0.2, strings=0.2),
        ),
        Stage(
            "2k",
            2048,
            64,
            1200,
            Mix(text=0.25, copies=0.05, keys=0.1, named=0.1, values=0.05, chains=0.2, medley=0.25),
        ),
        Stage("8k", 8192, 16, 1200, LONG),
        Stage("32k", 32768, 4, 450, LONG),
        Stage("128k", 131072, 1, 160, LONG),
    ),
    warmup=200,
    decay_share=0.15,  # the 32k and 128k stages
    sources=(STDLIB, *PACKAGES),
    drop_copies=True,
    log_every=20,
    workers=12,
    # 10 M weights and one momentum each: 40 MB where float32 would take 80.
    saved_weights="float16",
    saved_states="bfloat16",
)

RECIPES = {"CPU": CPU, "GPU": GPU}
