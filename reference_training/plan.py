"""What a recipe must compute and move, and how long that takes at least: the floor of a run.

Operations are counted, not measured: forward and backward of the matrices (3 x forward), of causal
attention (3.5 x forward, since the backward pass of flash attention computes the scores again),
and the bytes of what is kept for the backward pass, written once, read once, and its gradient
likewise, with the optimiser's passes over the weights. Each unit works alone in this count.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from .decoder import DecoderConfig
from .recipe import Recipe, Stage

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
OPTIMIZER_BYTES = 40  # a weight and step: weight, gradient, state read and written, clipping


@dataclass(frozen=True)
class Rates:
    """What a device reaches: bf16 TFLOP/s of matrix products and of attention, GB/s of copies."""

    matmul: float
    attention: float
    copy: float
    source: str


ASSUMED_H200 = Rates(400.0, 280.0, 4000.0, "assumed for one H200, not measured")


@dataclass(frozen=True)
class Cost:
    """Of one stage: tokens, TFLOP, GB moved; GB held for the backward pass of one step."""

    tokens: int
    matmul_tflop: float
    attention_tflop: float
    moved_gb: float
    held_gb: float

    def floor_s(self, rates: Rates) -> float:
        return (
            self.matmul_tflop / rates.matmul
            + self.attention_tflop / rates.attention
            + self.moved_gb / rates.copy
        )


def matrix_weights(c: DecoderConfig) -> int:
    """Weights that every token is multiplied with, the tied output embedding counted in."""
    heads = 2 * c.num_attention_heads + 2 * c.num_key_value_heads
    layer = c.hidden_size * (heads * c.head_dim + 3 * c.intermediate_size)
    return c.num_hidden_layers * layer + c.vocab_size * c.hidden_size


def kept_bytes_a_token(c: DecoderConfig) -> int:
    """Kept for the backward pass under bf16 autocast, no layer computed twice.

    A layer: two residual states in float32 and their normed copies in bf16, q, k, v (k and v
    repeated for the heads of a group) and the output, gate, up and their product. Then the
    logits, in bf16 and float32.
    """
    heads = 4 * c.num_attention_heads * c.head_dim
    layer = 2 * (4 + 2) * c.hidden_size + 2 * heads + 2 * 3 * c.intermediate_size
    return c.num_hidden_layers * layer + (2 + 4) * c.vocab_size


def cost(stage: Stage, c: DecoderConfig) -> Cost:
    tokens_a_step = stage.batch * stage.length
    tokens = stage.steps * tokens_a_step
    attention = 4 * c.num_attention_heads * c.head_dim * (stage.length / 2) * c.num_hidden_layers
    kept = kept_bytes_a_token(c)
    weights_passed = stage.steps * matrix_weights(c) * OPTIMIZER_BYTES
    return Cost(
        tokens,
        tokens * 3 * 2 * matrix_weights(c) / 1e12,
        tokens * 3.5 * attention / 1e12,
        (tokens * 4 * kept + weights_passed) / 1e9,
        tokens_a_step * kept / 1e9,
    )


def table(recipe: Recipe, rates: Rates, seconds_a_step: dict[str, float] | None = None) -> str:
    """One line a stage, and their sum; `seconds_a_step` adds what was measured."""
    lines = [
        f"rates: {rates.matmul:.0f} TFLOP/s matrices, {rates.attention:.0f} TFLOP/s attention, "
        f"{rates.copy:.0f} GB/s ({rates.source})",
        f"{'stage':>12} {'steps':>6} {'tokens':>7} {'TFLOP':>8} {'of it':>8} {'moved':>7} "
        f"{'held':>6} {'floor':>7} {'step':>8} {'measured':>9}",
        f"{'':>12} {'':>6} {'M':>7} {'matrices':>8} {'attent.':>8} {'TB':>7} "
        f"{'GB':>6} {'s':>7} {'floor ms':>8} {'s':>9}",
    ]
    floors, measured = 0.0, 0.0
    for stage in recipe.stages:
        own = cost(stage, recipe.decoder)
        floor = own.floor_s(rates)
        floors += floor
        taken = ""
        if seconds_a_step:
            measured += seconds_a_step[stage.name] * stage.steps
            taken = f"{seconds_a_step[stage.name] * stage.steps:.0f}"
        lines.append(
            f"{stage.name:>12} {stage.steps:>6} {own.tokens / 1e6:>7.1f} "
            f"{own.matmul_tflop:>8.0f} {own.attention_tflop:>8.0f} {own.moved_gb / 1e3:>7.1f} "
            f"{own.held_gb:>6.1f} {floor:>7.1f} {1e3 * floor / stage.steps:>8.1f} {taken:>9}"
        )
    total = f"{'all':>12} {recipe.total_steps:>6}" + " " * 41 + f"{floors:>7.1f}"
    lines.append(total + (f" {'':>8} {measured:>9.0f}" if seconds_a_step else ""))
    return "\n".join(lines)


def parse_rates(text: str) -> Rates:
    """`400,280,4000`: TFLOP/s of matrices, TFLOP/s of attention, GB/s."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 3 or min(numbers) <= 0:
        raise ValueError(
            "--rates must be three positive numbers, such as 400,280,4000 (TFLOP/s of matrices, "
            f"TFLOP/s of attention, GB/s); got {text!r}"
        )
    return Rates(*numbers, "given")


def measure_rates(recipe: Recipe, device: str) -> tuple[Rates, str]:
    """Rates of `device` at the recipe's own shapes, and the faster attention of BACKENDS.

    Attention is timed forward and backward at the longest stage, matrices at the MLP's shape.
    """
    c, longest = recipe.decoder, max(recipe.stages, key=lambda s: s.length)
    rows = longest.batch * longest.length
    x = torch.randn(rows, c.hidden_size, device=device, dtype=torch.bfloat16)
    w = torch.randn(c.hidden_size, c.intermediate_size, device=device, dtype=torch.bfloat16)
    matmul = 2 * x.shape[0] * w.numel() / seconds_of(lambda: x @ w, device) / 1e12
    source = torch.randn(2**28 if device.startswith("cuda") else 2**22, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device) / 1e9
    shape = (longest.batch, c.num_attention_heads, longest.length, c.head_dim)
    q, k, v = (
        torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    flop = 3.5 * 2 * longest.batch * c.num_attention_heads * c.head_dim * longest.length**2

    def both_ways():
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.grad(out, (q, k, v), out)

    attention = {}
    for name, backend in BACKENDS.items():
        try:
            with sdpa_kernel(backend):
                attention[name] = flop / seconds_of(both_ways, device) / 1e12
        except RuntimeError as error:
            print(f"attention {name}: not to be had ({str(error).splitlines()[0]})", flush=True)
            continue
        print(f"attention {name}: {attention[name]:.0f} TFLOP/s both ways", flush=True)
    if not attention:
        raise ValueError(f"the device must have flash attention for bf16; got {device}")
    best = max(attention, key=lambda name: attention[name])
    return Rates(matmul, attention[best], copy, f"measured, attention {best}"), best


def seconds_of(work: Callable[[], object], device: str, repeats: int = 5) -> float:
    """The median of `repeats` runs after one that is not counted."""
    taken = []
    for _ in range(repeats + 1):
        synchronize(device)
        begin = time.perf_counter()
        work()
        synchronize(device)
        taken.append(time.perf_counter() - begin)
    return sorted(taken[1:])[repeats // 2]


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
