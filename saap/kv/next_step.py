"""A decode step like the one before it: what has not changed since is not asked again.

Between two flushes a step differs from the one before in its token alone. What a general step
checks and looks up takes a processor as long as its kernels do (`benchmarks/decode`), so a store
keeps what the last one found.
"""

from bisect import bisect_left
from collections.abc import Callable

import torch
from torch import Tensor

from saap.kernels.append import PreparedAppend
from saap.kernels.attention.int8_rows import head_dim
from saap.kernels.backends.prepared import Preparation
from saap.selector import Selector

from .chunks import OutAndLse

MOST_STEPS = 4096
"""Steps after which a store asks again in any case."""


class NextStep(Preparation):
    """Appends one token to each sequence of a store and attends, as the step before did.

    A copy of it is None: what it holds belongs to one store.

    Args:
        buffers: keys and values of the store, `[B, Hkv, capacity, width]`.
        as_stored: what they hold of new ones, `[B, Hkv, 1, D]` of dtype `new_dtype`.
        growing: numbers of rows that one token adds 1 to: the tails of ranges.
        choose: writes the ranges of queries `[B, Hq, D]`; None where they do not depend on them.
        attend: attention of queries over what was chosen, `out, lse`.
        shape, dtype: of the queries `[B, Hq, 1, D]`.
        terms: what such steps have in common with the one before, beside their tensors.
        steps: how many such steps there can be.
        writes: whether it appends the token; else another store of the same rows has.
    """

    def __init__(
        self,
        buffers: tuple[Tensor, Tensor],
        as_stored: Callable[[Tensor], Tensor],
        new_dtype: torch.dtype,
        growing: list[Tensor],
        choose: Callable[[Tensor], object] | None,
        attend: Callable[[Tensor], tuple[Tensor, Tensor]],
        shape: torch.Size,
        dtype: torch.dtype,
        terms: dict[str, object],
        steps: int,
        *,
        writes: bool = True,
    ):
        self._as_stored, self._writes = as_stored, writes
        self._append = PreparedAppend(buffers if writes else (), growing)
        self._choose, self._attend = choose, attend
        k = buffers[0]
        self._fits = shape, dtype, (len(k), k.shape[1], 1, head_dim(k)), new_dtype, k.device
        self._terms, self._threads = terms, torch.get_num_threads()
        self._left = steps

    def fits(self, q: Tensor, k: Tensor, v: Tensor, terms: dict[str, object]) -> bool:
        """Whether this is the step for these queries, keys and values `[B, H, 1, D]`."""
        shape, dtype, new_shape, new_dtype, device = self._fits
        return (
            self._left > 0 and q.shape == shape and q.dtype is dtype and k.dtype is new_dtype
            and k.shape == new_shape and v.shape == new_shape and v.dtype is new_dtype
            and k.device == device and v.device == device and q.device == device
            and terms == self._terms and torch.get_num_threads() == self._threads
            and not (torch.is_grad_enabled() and (k.requires_grad or v.requires_grad))
        )  # fmt: skip

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> OutAndLse:
        """`lengths`: tokens of each sequence, without this one."""
        self._left -= 1
        self.write(k, v, lengths)
        q = q.squeeze(2)
        self.choose(q)
        out, lse = self.attend(q)
        return out.unsqueeze(2), lse.unsqueeze(2)

    def write(self, k: Tensor, v: Tensor, lengths: list[int]) -> None:
        """The token's row, behind the others of the tail."""
        if self._writes:
            self._append((self._as_stored(k), self._as_stored(v)), lengths)
        else:
            self._append((), ())

    def choose(self, q: Tensor) -> None:
        if self._choose is not None:
            self._choose(q)

    def attend(self, q: Tensor) -> tuple[Tensor, Tensor]:
        return self._attend(q)


def steps_left(
    selector: Selector | None, lengths: list[int], capacity: int, due: Callable[[int, int], bool]
) -> int:
    """Tokens that every sequence can take before one is full or has rows that are to join the
    middle. `due(b, n)`: whether sequence b has, of n tokens; it stays so as it grows."""
    most = min(capacity - max(lengths), MOST_STEPS)
    if selector is None:
        return most
    for b, n in enumerate(lengths):
        after = range(n + 1, n + most + 1)
        most = min(most, bisect_left(after, True, key=lambda at, b=b: due(b, at)))
    return most
