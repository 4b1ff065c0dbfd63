"""Linear layers over a few rows on a CPU, in the way that is the faster one there.

A verification multiplies a few rows with every weight. That should take hardly longer than one
row, for which the weights are read all the same, but `torch.nn.functional.linear` took 6.8 times
as long for nine rows as for one where this was measured (8192 x 2048 weights, MKL, AVX2); the same
product with the weights on the left took 2.4 times as long. So both are tried, once for weights of
a shape, and what is clearly faster is used from then on. They differ by rounding.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

MOST_ROWS = 32
LEAST_WEIGHTS = 1 << 18
"""Smaller products take microseconds in either way."""

CLEARLY = 1.25
_faster: dict[tuple, bool] = {}


class FewRows(TorchFunctionMode):
    """Within, linear layers of at most `MOST_ROWS` rows are computed in the faster way."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is linear and not kwargs and served(*args):
            return product(*args)
        return func(*args, **(kwargs or {}))


def serves(model: nn.Module, device: torch.device) -> bool:
    """Whether it is worth a try: a compiled model has products of its own."""
    compiled = getattr(model, "_compiled_call_impl", None) is not None
    return device.type == "cpu" and not compiled and not hasattr(
        model.forward, "_torchdynamo_orig_callable"
    )  # fmt: skip


def served(x, weight, bias=None) -> bool:
    return (
        type(x) is Tensor
        and x.is_cpu
        and x.dtype == weight.dtype
        and x.is_floating_point()
        and weight.dim() == 2
        and weight.numel() >= LEAST_WEIGHTS
        and 2 <= x.numel() // max(1, x.shape[-1]) <= MOST_ROWS
        and not torch.is_grad_enabled()
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear(x, weight, bias)`, in the way that was the faster one for such weights."""
    rows = x.numel() // x.shape[-1]
    about = (
        weight.shape, weight.stride(), weight.dtype, rows.bit_length(), torch.get_num_threads(),
    )  # fmt: skip
    found = _faster.get(about)
    if found is None:
        both = [fastest(lambda f=f: f(x, weight, bias)) for f in (linear, weights_left)]
        found = _faster[about] = both[0] > CLEARLY * both[1]
    return (weights_left if found else linear)(x, weight, bias)


def weights_left(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    out = torch.mm(weight, rows.T).T.contiguous()
    if bias is not None:
        out += bias
    return out.view(*x.shape[:-1], len(weight))


def fastest(call: Callable[[], Tensor]) -> float:
    """Seconds of the fastest of three calls."""
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
