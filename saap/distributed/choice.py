"""Which rows have the largest keys, where each rank holds some of the rows: by counting.

A number of keys above a threshold says more than the keys themselves do: all ranks add up how many
of their keys begin with which bits, and narrow the threshold down digit by digit. What they send
does not grow with rows, budget or ranks.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .group import Group

DIGITS = ((20, 11), (10, 10), (0, 10))
"""Shift and bits of each digit of a float32 not below 0, the first digit first."""


def among_largest(
    keys: Float[Tensor, "H n"], used: Bool[Tensor, "H n"], k: int, group: Group
) -> Bool[Tensor, "H n"]:
    """Which of this rank's keys are among the k largest of all ranks, for each of H choices.

    Keys are not below 0 (-0.0 counts as 0); those not `used` do not count. Of equal ones those of
    the lowest rank come first, and of one rank those with the lowest number. Where there are no
    more than k keys, all are.
    """
    heads = len(keys)
    bits = (keys.float() + 0.0).contiguous().view(torch.int32)
    prefix = torch.zeros(heads, 1, dtype=torch.int32, device=keys.device)
    left = torch.full((heads, 1), k, dtype=torch.int32, device=keys.device)
    inside = used
    for shift, size in DIGITS:
        digit = (bits >> shift) & (2**size - 1)
        counts = torch.zeros(heads, 2**size, dtype=torch.int32, device=keys.device)
        counts.scatter_add_(1, digit.long(), inside.int())
        group.add(counts)
        from_top = counts.flip(1).cumsum(1, dtype=torch.int32).flip(1)
        # The largest digit from which on there are at least as many keys as are left to take.
        found = (from_top >= left).sum(1, keepdim=True, dtype=torch.int32) - 1
        found = found.clamp(min=0)
        above = torch.where(
            found + 1 < 2**size,
            from_top.gather(1, (found + 1).clamp(max=2**size - 1).long()),
            0,
        )
        left -= above
        prefix |= found << shift
        inside = inside & (digit == found)
    ties = torch.stack(group.gather(inside.sum(1, dtype=torch.int32)))
    before = ties[: group.rank].sum(0)[:, None]
    return (used & (bits > prefix)) | (inside & (inside.cumsum(1) + before <= left))
