"""Merge of partial attention results, the identity that split-K and stream-K rest on."""

import torch
from jaxtyping import Float
from torch import Tensor


def merge_states(
    out_a: Float[Tensor, "*rows D"],
    lse_a: Float[Tensor, "*rows"],
    out_b: Float[Tensor, "*rows D"],
    lse_b: Float[Tensor, "*rows"],
) -> tuple[Float[Tensor, "*rows D"], Float[Tensor, "*rows"]]:
    """Attention over the union of two disjoint sets of keys, from attention over each.

    Associative and commutative up to rounding (LeanAttention, arXiv 2405.10480, section 4.1).

    Args:
        out_a, out_b: `[..., D]`, softmax-weighted values of each set, one dtype.
        lse_a, lse_b: `[...]`, natural-log log-sum-exp of each set's scaled scores, float32 or
            float64; -inf where the set is empty, and then its `out` is ignored.

    Returns:
        `out [..., D]` in the dtype of `out_a` and `lse [...]` in that of `lse_a`; 0 and -inf
        where both sets are empty.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other.
    """
    _check(out_a, lse_a, out_b, lse_b)
    top = torch.maximum(lse_a, lse_b)
    top = torch.where(top == -torch.inf, 0.0, top)
    weight_a, weight_b = torch.exp(lse_a - top), torch.exp(lse_b - top)
    total = weight_a + weight_b
    safe_total = torch.where(total == 0, 1.0, total)
    out = _weighted(out_a, weight_a / safe_total) + _weighted(out_b, weight_b / safe_total)
    lse = torch.where(top == torch.inf, top, top + torch.log(total))  # of +inf it is no number
    return out.to(out_a.dtype), lse


def _weighted(out: Tensor, weight: Tensor) -> Tensor:
    weight = weight.unsqueeze(-1)
    return torch.where(weight == 0, 0.0, out.to(weight.dtype) * weight)


def _check(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    for name, out in (("out_a", out_a), ("out_b", out_b)):
        if not out.is_floating_point():
            raise ValueError(f"{name} must have a floating-point dtype; got {out.dtype}")
    if out_b.shape != out_a.shape or out_b.dtype != out_a.dtype:
        raise ValueError(
            f"out_b must be like out_a, {out_a.dtype} {tuple(out_a.shape)}; got {out_b.dtype} "
            f"{tuple(out_b.shape)}"
        )
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        if lse.shape != out_a.shape[:-1]:
            raise ValueError(
                f"{name} must have the shape of out_a without D, {tuple(out_a.shape[:-1])}; got "
                f"{tuple(lse.shape)}"
            )
        if lse.dtype not in (torch.float32, torch.float64) or lse.dtype != lse_a.dtype:
            raise ValueError(
                f"lse_a and lse_b must both be float32 or both float64; got {name} of {lse.dtype}"
            )
    for name, tensor in (("lse_a", lse_a), ("out_b", out_b), ("lse_b", lse_b)):
        if tensor.device != out_a.device:
            raise ValueError(f"{name} must be on {out_a.device}, as out_a; got {tensor.device}")
