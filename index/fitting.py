"""Fit routers to observed bucket masses, all heads in one batched optimisation."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .routers import LinearRouter, MLPRouter


def fit_linear(
    q: Float[Tensor, "H n D"],
    mass: Float[Tensor, "H n classes"],
    *,
    ridge: float = 1e-3,
    chunk: int = 16384,
) -> LinearRouter:
    """Closed form: least squares from query to the mass of each bucket.

    `mass` sums to 1 with its last class, sinks and window, which the fit leaves out. `ridge` is
    relative to the mean variance of the queries. The normal equations are summed over chunks in
    float64.
    """
    heads, n, dim = q.shape
    classes = mass.shape[-1] - 1
    gram = torch.zeros(heads, dim + 1, dim + 1, dtype=torch.float64, device=q.device)
    cross = torch.zeros(heads, dim + 1, classes, dtype=torch.float64, device=q.device)
    for start in range(0, n, chunk):
        x = torch.nn.functional.pad(q[:, start : start + chunk].float(), (0, 1), value=1.0)
        gram += (x.mT @ x).double()
        cross += (x.mT @ mass[:, start : start + chunk, :-1].float()).double()
    variance = gram.diagonal(dim1=-2, dim2=-1)[:, :-1].mean(-1)
    penalty = torch.eye(dim + 1, dtype=torch.float64, device=q.device)
    penalty[-1, -1] = 1e-9  # the bias is not shrunk
    solution = torch.linalg.solve(gram + ridge * variance[:, None, None] * penalty, cross)
    return LinearRouter(solution[:, :-1].mT.float().contiguous(), solution[:, -1].float())


def fit_mlp(
    q: Float[Tensor, "H n D"],
    mass: Float[Tensor, "H n classes"],
    sizes: Float[Tensor, "Hkv blocks nlist"] | None = None,
    block_of: Int[Tensor, " n"] | None = None,
    *,
    hidden: int = 128,
    steps: int = 400,
    batch: int = 512,
    lr: float = 4e-3,
    seed: int = 0,
    progress: Callable[[int, int, float], None] | None = None,
) -> MLPRouter:
    """Cross-entropy against the true mass over buckets (Saap, arXiv 2502.08246, section 4.2).

    All H heads (of all layers) train together as batched matrix products. `mass [H, n, nlist + 1]`
    may be float16; its last class is the mass of sinks and window, so a query weighs as much as it
    looks into the middle. `sizes[:, block_of[i]]` are the keys in each bucket as query i sees
    them, a KV head each; all alike if not given. Raises FloatingPointError when the loss is not
    finite.
    """
    nlist = mass.shape[-1] - 1
    # A head at a time: the masses are the largest tensor of a layer and float16.
    start = torch.stack([own.float().mean(0) for own in mass]).clamp(min=1e-6).log()
    if sizes is not None:
        group = len(q) // len(sizes)
        typical = sizes.float().mean(1).clamp(min=0.25).repeat_interleave(group, 0)
        start[:, :nlist] -= typical.log()
    parameters = two_layers(q, start, hidden, seed)
    router = MLPRouter(**parameters)

    def loss_of(picked):
        logits = router.logits(q[:, picked].transpose(0, 1)).transpose(0, 1)
        if sizes is not None:
            own = sizes[:, block_of[picked]].float().clamp(min=1e-6).log()
            own = torch.nn.functional.pad(own.repeat_interleave(group, 0), (0, 1))
            logits = logits + own
        return -(mass[:, picked].float() * logits.log_softmax(-1)).sum(-1)

    optimise(parameters, loss_of, q.shape[1], steps, batch, lr, seed, progress)
    return MLPRouter(**{name: p.detach() for name, p in parameters.items()})


def two_layers(
    q: Float[Tensor, "H n D"], start: Float[Tensor, "H classes"], hidden: int, seed: int
) -> dict[str, Tensor]:
    """Parameters of a two-layer network for each head that begins by answering `start`."""
    heads, _, dim = q.shape
    generator = torch.Generator(device="cpu").manual_seed(seed)

    def random(*shape, fan_in):
        values = torch.randn(*shape, generator=generator) / math.sqrt(fan_in)
        return values.to(q.device).requires_grad_()

    return {
        "mean": q.float().mean(1),
        "scale": q.float().std(1).clamp(min=1e-6).reciprocal(),
        "w1": random(heads, hidden, dim, fan_in=dim),
        "b1": torch.zeros(heads, hidden, device=q.device).requires_grad_(),
        "w2": random(heads, start.shape[1], hidden, fan_in=4 * hidden),
        "b2": start.clone().requires_grad_(),
    }


def optimise(
    parameters: dict[str, Tensor],
    loss_of: Callable[[Int[Tensor, " batch"]], Float[Tensor, "H batch"]],
    n: int,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    progress: Callable[[int, int, float], None] | None,
) -> None:
    """AdamW with warm-up and cosine decay on random batches of n queries, in place."""
    trained = [p for p in parameters.values() if p.requires_grad]
    generator = torch.Generator(device="cpu").manual_seed(seed)
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        rate = min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr * rate
        losses = loss_of(torch.randint(n, (batch,), generator=generator).to(trained[0].device))
        # Summed over heads: the learning rate is independent of how many train together.
        optimizer.zero_grad(set_to_none=True)
        losses.mean(1).sum().backward()
        optimizer.step()
        if step % 25 == 0 or step == steps - 1:
            value = losses.mean().item()
            if not math.isfinite(value):
                raise FloatingPointError(f"router loss is {value} at step {step}")
            if progress is not None:
                progress(step + 1, steps, value)
