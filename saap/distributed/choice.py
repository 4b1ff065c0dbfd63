"""Which rows have the largest keys, where each rank holds some of the rows: by counting.

A number of keys above a threshold says more than the keys themselves do: all ranks add up how many
of their keys begin with which bits, and narrow the threshold down digit by digit. What they send
does not grow with rows, budget or ranks.
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from .group import Group

DIGITS = ((21, 11), (10, 11), (0, 10))
"""Shift and bits of each digit of a key, the first digit first."""


def among_largest(
    keys: Float[Tensor, "H n"], used: Bool[Tensor, "H n"] | None, k: int, group: Group
) -> Bool[Tensor, "H n"]:
    """Which of this rank's keys are among the k largest of all ranks, for each of H choices.

    Keys that are not `used` do not count (None: all do); -0.0 counts as 0. Of equal ones those of
    the lowest rank come first, and of one rank those with the lowest number. Where there are no
    more than k keys, all are.
    """
    heads = len(keys)
    bits = _in_order(keys.float())
    prefix = torch.zeros(heads, 1, dtype=torch.int64, device=keys.device)
    left = torch.full((heads, 1), k, dtype=torch.int32, device=keys.device)
    inside = None  # head and number of the keys that begin as the threshold does; None: all
    for shift, size in DIGITS:
        if inside is None:
            head = torch.arange(heads, device=keys.device)[:, None]
            digit = bits >> shift
            counted = digit + (head << size)
            if used is not None:
                counted = torch.where(used, counted, heads << size)
            counted = counted.flatten()
        else:
            digit = (bits[inside] >> shift) & (2**size - 1)
            counted = digit + (inside[0] << size)
        counts = torch.bincount(counted, minlength=(heads << size) + 1)[:-1]
        counts = group.add(counts.view(heads, -1).int())
        from_top = counts.flip(1).cumsum(1, dtype=torch.int32).flip(1)
        # The largest digit from which on there are at least as many keys as are left to take.
        found = ((from_top >= left).sum(1, keepdim=True) - 1).clamp(min=0)
        beyond = torch.nn.functional.pad(from_top, (0, 1))
        left = left - beyond.gather(1, found + 1)
        prefix = prefix | found << shift
        if inside is None:
            same = digit == found if used is None else (digit == found) & used
            inside = same.nonzero(as_tuple=True)
        else:
            same = digit == found[inside[0], 0]
            inside = tuple(place[same] for place in inside)
    own = torch.bincount(inside[0], minlength=heads).int()
    ties = torch.stack(group.gather(own))
    before = ties[: group.rank].sum(0) - (own.cumsum(0) - own)
    taken = torch.arange(len(inside[0]), device=keys.device) + before[inside[0]]
    taken = taken < left[inside[0], 0]
    chosen = bits > prefix if used is None else used & (bits > prefix)
    chosen[tuple(place[taken] for place in inside)] = True
    return chosen


def _in_order(keys: Float[Tensor, "H n"]) -> Int64[Tensor, "H n"]:
    """Whole numbers of 32 bits, not below 0, in the order of the keys."""
    bits = (keys + 0.0).contiguous().view(torch.int32)
    return (bits ^ (bits >> 31 & 0x7FFFFFFF)).long() + 2**31
