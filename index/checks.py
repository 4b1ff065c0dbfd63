"""Checks of what users hand to an index: each names the value and what is accepted."""

import torch
from torch import Tensor

from .kmeans import check_finite

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def listed(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(map(str, dtypes))


def at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}={value!r}: accepted are integers from {least}")


def vectors(name: str, x: Tensor, n_kv: int, d: int, dtype: torch.dtype | None = None) -> None:
    """Finite vectors `[n_kv, n, d]`, n at least 1, of `dtype` or of any that an index holds."""
    if x.ndim != 3 or x.shape[0] != n_kv or x.shape[2] != d or x.shape[1] == 0:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}: accepted is [{n_kv}, n, {d}] with n from 1"
        )
    accepted = DTYPES if dtype is None else (dtype,)
    if x.dtype not in accepted:
        raise ValueError(f"{name} has dtype {x.dtype}: accepted is {listed(accepted)}")
    check_finite(x, name)


def queries(name: str, xq: Tensor, n_kv: int, d: int, n_heads: int | None = None) -> None:
    """Finite queries `[n, Hq, d]`, Hq the router's heads, or else a multiple of the KV heads."""
    heads = f"a multiple of {n_kv}" if n_heads is None else str(n_heads)
    wrong = xq.ndim != 3 or xq.shape[2] != d or xq.shape[1] == 0 or xq.shape[1] % n_kv
    if wrong or (n_heads is not None and xq.shape[1] != n_heads):
        raise ValueError(f"{name} has shape {tuple(xq.shape)}: accepted is [n, {heads}, {d}]")
    if xq.dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {xq.dtype}: accepted is {listed(DTYPES)}")
    check_finite(xq, name)


def same_shape(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.shape != other.shape:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}: accepted is that of {other_name}, "
            f"{tuple(other.shape)}"
        )


def integers(name: str, x: Tensor) -> None:
    """A list of numbers `[m]`, int64 or int32."""
    if x.ndim != 1 or x.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{name} has shape {tuple(x.shape)} and dtype {x.dtype}: accepted is [m] of integers"
        )


def new_positions(positions: Tensor, count: int, known: Tensor, first_free: int) -> None:
    """`count` positions from 0, none twice and none `known`; from `first_free` on all are free."""
    if positions.shape != (count,) or positions.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"positions has shape {tuple(positions.shape)} and dtype {positions.dtype}: accepted "
            f"is [{count}] of integers"
        )
    if int(positions.min()) < 0:
        raise ValueError(f"position {int(positions.min())}: accepted are 0 and more")
    values, counts = positions.unique(return_counts=True)
    repeated = values[counts > 1]
    if len(repeated) == 0 and int(values[0]) < first_free:
        repeated = values[torch.isin(values.to(known.device), known).to(values.device)]
    if len(repeated):
        raise ValueError(f"position {int(repeated[0])} occurs twice: accepted is each once")
