"""Check headers and tensors of files: each mistake raises a ValueError that begins `PATH: `."""

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

Layout = dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]
FLOAT32 = (torch.float32,)
MOST_LISTS = 65536
MOST = 2**40


class Fields:
    """The values of a header, or of a part of it, each checked as it is read by its name."""

    def __init__(self, path: str | Path, values: object, where: str = "its header"):
        self.path, self.where = path, where
        if not isinstance(values, dict):
            raise ValueError(f"{path}: {where} must be a table of values; got {short(values)}")
        self.values = values

    def get(self, name: str):
        if name not in self.values:
            raise ValueError(f"{self.path}: {self.where} must hold {name}; got none")
        return self.values[name]

    def wrong(self, name: str, wanted: str) -> ValueError:
        return ValueError(
            f"{self.path}: {self.where} must hold {name} as {wanted}; got "
            f"{short(self.values.get(name))}"
        )

    def integer(self, name: str, least: int = 0, most: int = MOST) -> int:
        value = self.get(name)
        if not is_integer(value) or not least <= value <= most:
            raise self.wrong(name, f"an integer from {least} to {most}")
        return value

    def flag(self, name: str) -> bool:
        if not isinstance(self.get(name), bool):
            raise self.wrong(name, "true or false")
        return self.values[name]

    def text(self, name: str, among: Iterable[str] | None = None) -> str:
        value = self.get(name)
        if not isinstance(value, str):
            raise self.wrong(name, "text")
        if among is not None and value not in among:
            raise self.wrong(name, " or ".join(map(repr, among)))
        return value

    def integers(self, name: str, least: int = 0) -> list[int]:
        value = self.get(name)
        if not isinstance(value, list) or not all(is_integer(x) and x >= least for x in value):
            raise self.wrong(name, f"a list of integers from {least}")
        return value

    def numbers(self, name: str, count: int, *, positive: bool = False) -> list[float]:
        value = self.get(name)
        kind = f"a list of {count} {'positive' if positive else 'finite'} numbers"
        if not isinstance(value, list) or len(value) != count:
            raise self.wrong(name, kind)
        if not all(is_number(x) and (x > 0 or not positive) for x in value):
            raise self.wrong(name, kind)
        return value

    def items(self, name: str, count: int | None = None) -> list:
        value = self.get(name)
        if not isinstance(value, list) or (count is not None and len(value) != count):
            raise self.wrong(name, "a list" if count is None else f"a list of {count}")
        return value

    def section(self, name: str) -> "Fields":
        return Fields(self.path, self.get(name), f"its header's {name}")


def is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    return (isinstance(value, float) or (is_integer(value) and abs(value) < MOST)) and (
        math.isfinite(value)
    )


def short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def check_layout(path: str | Path, tensors: dict[str, Tensor], layout: Layout) -> None:
    """Raise ValueError for tensors that are missing, unexpected, or of another shape or dtype."""
    for name in {**layout, **tensors}:
        t = tensors.get(name)
        if name not in layout:
            raise ValueError(f"{path}: {name} must not be there, by its header; got one")
        shape, dtypes = layout[name]
        if t is None or tuple(t.shape) != tuple(shape) or t.dtype not in dtypes:
            wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            found = "none" if t is None else f"{str(t.dtype)[6:]} {list(t.shape)}"
            raise ValueError(
                f"{path}: {name} must be {wanted} {list(shape)}, by its header; got {found}"
            )


def check_finite(path: str | Path, tensors: dict[str, Tensor]) -> None:
    for name, t in tensors.items():
        if t.is_floating_point() and not torch.isfinite(t).all():
            raise ValueError(f"{path}: {name} must be finite; got NaN or inf")


def check_range(path: str | Path, name: str, t: Tensor, least: int, most: int) -> None:
    """Raise ValueError when an integer of `t` is below `least` or above `most`."""
    if t.numel():
        low, high = (int(x) for x in t.aminmax())
        if low < least or high > most:
            raise ValueError(f"{path}: {name} must be within {least}..{most}; got {low}..{high}")


def router_layout(
    name: str,
    tensors: dict[str, Tensor],
    *,
    prefix: str,
    n_heads: int,
    nlist: int,
    dim: int,
    dtypes: tuple[torch.dtype, ...] = FLOAT32,
) -> Layout:
    """The layout that the tensors of a "linear" or "mlp" router must have.

    The hidden size of an "mlp" router is taken from its tensors.
    """
    if name == "linear":
        return {
            prefix + "weight": ((n_heads, nlist, dim), dtypes),
            prefix + "bias": ((n_heads, nlist), dtypes),
        }
    w1 = tensors.get(prefix + "w1")
    hidden = w1.shape[1] if w1 is not None and w1.ndim == 3 and w1.shape[1] else 1
    eighths = prefix + "w2_scale" in tensors
    layout = {
        prefix + "mean": ((n_heads, dim), dtypes),
        prefix + "scale": ((n_heads, dim), dtypes),
        prefix + "w1": ((n_heads, hidden, dim), dtypes),
        prefix + "b1": ((n_heads, hidden), dtypes),
        prefix + "w2": ((n_heads, nlist + 1, hidden), (torch.int8,) if eighths else dtypes),
        prefix + "b2": ((n_heads, nlist + 1), dtypes),
    }
    return layout | ({prefix + "w2_scale": ((n_heads, nlist + 1), dtypes)} if eighths else {})
