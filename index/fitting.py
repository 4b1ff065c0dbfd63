"""Fit routers to observed bucket masses, all heads in one batched optimisation."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from .routers import LinearRouter, MLPRouter

CACHED_FLOATS = 2**20


def fit_linear(
    q: Float[Tensor, "H n D"],
    mass: Float[Tensor, "H n classes"],
    *,
    ridge: float = 1e-3,
    chunk: int = 16384,
) -> LinearRouter:
    """Fit the mass of each bucket to the query by least squares, in closed form.

    `mass` sums to 1 with its last class, sinks and window, which the fit leaves out. `ridge` is
    relative to the mean variance of the queries. The normal equations are summed over chunks in
    float64.
    """
    if not 0 <= ridge < float("inf"):
        raise ValueError(f"ridge must be a number of at least 0; got {ridge}")
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


@torch.no_grad()
def fit_mlp(
    q: Float[Tensor, "H n D"],
    mass: Float[Tensor, "H n classes"],
    sizes: Num[Tensor, "Hkv blocks nlist"] | None = None,
    block_of: Int[Tensor, " n"] | None = None,
    *,
    hidden: int = 128,
    steps: int = 400,
    batch: int = 512,
    lr: float = 4e-3,
    seed: int = 0,
    progress: Callable[[int, int, float], None] | None = None,
) -> MLPRouter:
    """Fit `MLPRouter`s by cross-entropy against the true mass over buckets.

    All H heads train together as batched matrix products. `mass [H, n, nlist + 1]`
    may be float16; its last class is the mass of sinks and window, so a query has as much weight
    in the loss as it has attention on the middle. `sizes[:, block_of[i]]` are the numbers of keys
    in each bucket that query i sees, for each KV head; if not given, all buckets count as equally
    large. Raises FloatingPointError when the loss is not finite.

    Source: Saap, arXiv 2502.08246, section 4.2.
    """
    # One head at a time: the masses are the largest tensor of a layer, in float16.
    start = torch.stack([own.float().mean(0) for own in mass]).clamp(min=1e-6).log()
    log_sizes = None
    if sizes is not None:
        typical = sizes.float().mean(1).clamp(min=0.25)
        start[:, :-1] -= typical.log().repeat_interleave(len(q) // len(sizes), 0)
        log_sizes = sizes.float().clamp(min=1e-6).log()
    router = two_layers(q, start, hidden, seed)
    trained = {n: t for n, t in router.tensors().items() if n not in ("mean", "scale")}
    for parameter in trained.values():
        parameter.grad = torch.empty_like(parameter)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    optimizer = torch.optim.AdamW(
        trained.values(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    for step in range(steps):
        rate = min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr * rate
        picked = torch.randint(q.shape[1], (batch,), generator=generator).to(q.device)
        blocks = None if log_sizes is None else block_of[picked]
        tell = step % 25 == 0 or step == steps - 1
        losses = [
            backward(router, trained, heads, q, mass, picked, log_sizes, blocks, with_loss=tell)
            for heads in head_groups(q, mass, log_sizes, batch)
        ]
        optimizer.step()
        if tell:
            value = torch.cat(losses).mean().item()
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"the router loss must be finite; got {value} at step {step}"
                )
            if progress is not None:
                progress(step + 1, steps, value)
    return MLPRouter(**{name: t.detach() for name, t in router.tensors().items()})


def two_layers(
    q: Float[Tensor, "H n D"], start: Float[Tensor, "H classes"], hidden: int, seed: int
) -> MLPRouter:
    """A two-layer network for each head whose output is about `start` before training."""
    heads, _, dim = q.shape
    generator = torch.Generator(device="cpu").manual_seed(seed)

    def random(*shape, fan_in):
        values = torch.randn(*shape, generator=generator, dtype=torch.float32) / math.sqrt(fan_in)
        return values.to(q.device)

    return MLPRouter(
        mean=q.float().mean(1),
        scale=q.float().std(1).clamp(min=1e-6).reciprocal(),
        w1=random(heads, hidden, dim, fan_in=dim),
        b1=torch.zeros(heads, hidden, device=q.device, dtype=torch.float32),
        w2=random(heads, start.shape[1], hidden, fan_in=4 * hidden),
        b2=start.clone(),
    )


def head_groups(q: Tensor, mass: Tensor, log_sizes: Tensor | None, batch: int) -> list[slice]:
    """Groups of heads that are trained together in a step.

    On a GPU this is all heads; on a CPU it is as many whole KV groups as fit into a cache, because
    logits and what is computed from them are read about ten times per step.
    """
    heads, together = len(q), len(q)
    if not q.is_cuda:
        group = 1 if log_sizes is None else heads // len(log_sizes)
        cached = CACHED_FLOATS // (batch * mass.shape[-1])
        together = min(heads, max(1, cached // group) * group)
    return [slice(first, min(first + together, heads)) for first in range(0, heads, together)]


def backward(
    router: MLPRouter,
    trained: dict[str, Tensor],
    heads: slice,
    q: Float[Tensor, "H n D"],
    mass: Float[Tensor, "H n classes"],
    picked: Int[Tensor, " batch"],
    log_sizes: Float[Tensor, "Hkv blocks nlist"] | None,
    blocks: Int[Tensor, " batch"] | None,
    *,
    with_loss: bool,
) -> Float[Tensor, "heads batch"] | None:
    """Write the gradients of the mean cross-entropy of the picked queries to `grad`.

    They are computed by hand, because the gradient with respect to the logits is softmax minus
    target and automatic differentiation reads the logits twice as often. Losses are computed and
    returned only with `with_loss`.
    """
    w1, b1, w2, b2 = (getattr(router, name)[heads] for name in ("w1", "b1", "w2", "b2"))
    x = (q[heads, picked].float() - router.mean[heads, None]) * router.scale[heads, None]
    target = mass[heads, picked].float()
    before = torch.baddbmm(b1[:, None], x, w1.mT)
    gate = before.sigmoid()
    inner = before * gate
    logits = torch.baddbmm(b2[:, None], inner, w2.mT)
    if log_sizes is not None:
        group = len(q) // len(log_sizes)
        own = log_sizes[heads.start // group : heads.stop // group, blocks]
        logits.unflatten(0, (-1, group))[..., :-1].add_(own[:, None])
    total = target.sum(-1)
    losses = None
    if with_loss:
        losses = total * logits.logsumexp(-1) - (target * logits).sum(-1)
    slope = (
        logits.softmax(-1).mul_(total[..., None] / len(picked)).sub_(target, alpha=1 / len(picked))
    )
    inner_slope = (slope @ w2) * gate * (1 + before * (1 - gate))
    torch.bmm(slope.mT, inner, out=trained["w2"].grad[heads])
    torch.bmm(inner_slope.mT, x, out=trained["w1"].grad[heads])
    trained["b2"].grad[heads] = slope.sum(1)
    trained["b1"].grad[heads] = inner_slope.sum(1)
    return losses
