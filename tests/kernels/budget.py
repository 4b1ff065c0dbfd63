"""One tolerance for all kernels: an error budget against float64, not a literal.

A kernel may err at most twice as much as plain PyTorch in the same dtype, plus the rounding of its
output to that dtype and, for outputs, what rounding the scores makes of the weights.
"""

import torch
from torch import Tensor

from saap.kernels.attention import reference


def rounding(values: Tensor, dtype: torch.dtype) -> float:
    """One unit in the last place of `dtype` at the largest finite magnitude of `values`."""
    finite = values[torch.isfinite(values)]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    return torch.finfo(dtype).eps * max(scale, 1.0)


def assert_within_budget(
    result: tuple[Tensor, Tensor],
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    *,
    sm_scale: float,
    softcap: float | None = None,
) -> None:
    """`result = (out, lse)` of `inputs = (q, k, v, starts, lengths)` against the reference.

    Empty rows have to be exactly 0 and -inf; everything else finite.
    """
    q, k, v, starts, lengths = (t.cpu() for t in inputs)
    options = {"sm_scale": sm_scale, "softcap": softcap}
    exact = reference.attend_ranges(q.double(), k.double(), v.double(), starts, lengths, **options)
    eager = reference.attend_ranges(q, k, v, starts, lengths, **options)
    empty = torch.isneginf(exact[1])
    for name, got, true, plain, dtype in zip(
        ("out", "lse"), result, exact, eager, (q.dtype, torch.float32), strict=True
    ):
        got, plain = got.detach().cpu().double(), plain.double()
        assert got.shape == true.shape, f"{name} has shape {tuple(got.shape)}"
        assert (got[empty] == (0.0 if name == "out" else -torch.inf)).all(), f"{name}: empty rows"
        error = (got[~empty] - true[~empty]).abs()
        allowed = 2 * rounding(true, dtype)
        if (~empty).any():
            allowed += 2 * (plain[~empty] - true[~empty]).abs().max()
            if (
                name == "out"
            ):  # a score of size s is known to s units of rounding: so is its weight
                allowed += rounding(true, torch.float32) * exact[1][~empty].abs().max()
        assert torch.isfinite(error).all(), f"{name} holds NaN or inf"
        if error.numel():
            assert float(error.max()) <= float(allowed), (
                f"{name} is off by {float(error.max()):.2e}: the budget is {float(allowed):.2e}"
            )
