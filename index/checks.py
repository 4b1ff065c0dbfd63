"""Checks of what users pass to an index: each error says what must hold and what was got."""

import torch
from torch import Tensor

from .kmeans import check_finite

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_POSITION = 2**62
"""Of what files hold, so of what an index takes."""


def listed(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(map(str, dtypes))


def at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}; got {value!r}")


def within(least: int, most: int, **values: int) -> None:
    for name, value in values.items():
        at_least(least, **{name: value})
        if value > most:
            raise ValueError(f"{name} must be at most {most}; got {value}")


def vectors(name: str, x: Tensor, n_kv: int, d: int, dtype: torch.dtype | None = None) -> None:
    """Check that `x` is finite vectors `[n_kv, n, d]`, n at least 1, of a dtype of an index.

    `dtype`: the only one that is allowed, or None for any that an index can hold.
    """
    if x.ndim != 3 or x.shape[0] != n_kv or x.shape[2] != d or x.shape[1] == 0:
        raise ValueError(
            f"{name} must be [{n_kv}, n, {d}] with n of at least 1; got {tuple(x.shape)}"
        )
    allowed = DTYPES if dtype is None else (dtype,)
    if x.dtype not in allowed:
        raise ValueError(f"{name} must have dtype {listed(allowed)}; got {x.dtype}")
    check_finite(x, name)


def queries(name: str, xq: Tensor, n_kv: int, d: int, n_heads: int | None = None) -> None:
    """Check that `xq` is finite queries `[n, Hq, d]`.

    Hq is `n_heads`, the number of heads of a router, or if None any multiple of the KV heads.
    """
    heads = f"a multiple of {n_kv}" if n_heads is None else str(n_heads)
    wrong = xq.ndim != 3 or xq.shape[2] != d or xq.shape[1] == 0 or xq.shape[1] % n_kv
    if wrong or (n_heads is not None and xq.shape[1] != n_heads):
        raise ValueError(f"{name} must be [n, {heads}, {d}]; got {tuple(xq.shape)}")
    if xq.dtype not in DTYPES:
        raise ValueError(f"{name} must have dtype {listed(DTYPES)}; got {xq.dtype}")
    check_finite(xq, name)


def same_shape(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.shape != other.shape:
        raise ValueError(
            f"{name} must have the shape of {other_name}, {tuple(other.shape)}; got "
            f"{tuple(x.shape)}"
        )


def integers(name: str, x: Tensor) -> None:
    """Check that `x` is a list of integers `[m]`, int64 or int32."""
    if x.ndim != 1 or x.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{name} must be integers [m]; got shape {tuple(x.shape)} and dtype {x.dtype}"
        )


def new_positions(positions: Tensor, count: int, known: Tensor, first_free: int) -> None:
    """Check that `positions` are `count` integers from 0, none twice and none among `known`.

    Positions from `first_free` on are known to be free.
    """
    if positions.shape != (count,) or positions.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"positions must be integers [{count}]; got shape {tuple(positions.shape)} and dtype "
            f"{positions.dtype}"
        )
    if int(positions.min()) < 0:
        raise ValueError(f"positions must be at least 0; got {int(positions.min())}")
    if int(positions.max()) > MOST_POSITION:
        raise ValueError(f"positions must be at most 2**62; got {int(positions.max())}")
    values, counts = positions.unique(return_counts=True)
    repeated = values[counts > 1]
    if len(repeated) == 0 and int(values[0]) < first_free:
        repeated = values[torch.isin(values.to(known.device), known).to(values.device)]
    if len(repeated):
        raise ValueError(f"positions must occur once each; got {int(repeated[0])} twice")
