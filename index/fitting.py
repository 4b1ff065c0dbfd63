"""Fit routers to observed bucket masses, all heads in one batched optimisation."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
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
    *,
    hidden: int = 128,
    steps: int = 800,
    batch: int = 512,
    lr: float = 4e-3,
    seed: int = 0,
    progress: Callable[[int, int, float], None] | None = None,
) -> MLPRouter:
    """Cross-entropy against the true mass over buckets (Saap, arXiv 2502.08246, section 4.2).

    All H heads (of all layers) train together as batched matrix products. `mass [H, n, nlist + 1]`
    may be float16; its last class is the mass of sinks and window, so a query weighs as much as it
    looks into the middle. Raises FloatingPointError when the loss is not finite.
    """
    heads, n, dim = q.shape
    classes = mass.shape[-1]
    generator = torch.Generator(device="cpu").manual_seed(seed)
    mean = q.float().mean(1)
    scale = q.float().std(1).clamp(min=1e-6).reciprocal()

    def init(*shape, fan_in):
        values = torch.randn(*shape, generator=generator) / math.sqrt(fan_in)
        return values.to(q.device).requires_grad_()

    average = mass.float().mean(1).clamp(min=1e-6)
    parameters = {
        "w1": init(heads, hidden, dim, fan_in=dim),
        "b1": torch.zeros(heads, hidden, device=q.device).requires_grad_(),
        "w2": init(heads, classes, hidden, fan_in=4 * hidden),
        "b2": average.log().requires_grad_(),  # start from the mean distribution
    }
    router = MLPRouter(mean, scale, **parameters)
    optimizer = torch.optim.AdamW(parameters.values(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    # The mean over heads keeps the learning rate independent of how many train together.
    for step in range(steps):
        rate = min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr * rate
        picked = torch.randint(n, (batch,), generator=generator).to(q.device)
        target = mass[:, picked].float()
        log_p = router.logits(q[:, picked].transpose(0, 1)).log_softmax(-1).transpose(0, 1)
        loss = -(target * log_p).sum(-1).mean(1).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if progress is not None and (step % 25 == 0 or step == steps - 1):
            value = loss.item() / heads
            if not math.isfinite(value):
                raise FloatingPointError(f"router loss is {value} at step {step}")
            progress(step + 1, steps, value)
    return MLPRouter(mean, scale, **{name: p.detach() for name, p in parameters.items()})
