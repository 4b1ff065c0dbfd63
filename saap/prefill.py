"""How much of a long context the tokens of a prompt may visit while they are read."""

import math
from dataclasses import dataclass
from numbers import Real

from .budget import MOST, is_integer

LEAST_BLOCK, MOST_BLOCK = 16, 4096


@dataclass(frozen=True)
class PrefillBudget:
    """What a token of a long prompt visits of each layer; validated when made.

    A forward of several tokens is cut into blocks of `block` tokens. Each block sees the sinks and
    the window before it (those of `Budget`), itself, causally, and rows between sinks and window
    that its queries choose together for each KV head. All in all that is the share `visited` of
    the context so far, or `max_tokens` rows; give at least one, of both the lesser counts. Sinks,
    window and the block itself are always visited, whatever they take.

    `averaged`: rows are chosen by the mean queries of this many neighbouring tokens each. With
    fewer, more of what single tokens look up is found, but choosing takes longer (docs/scale.md).
    `exact_last`: this many tokens at the end of every forward visit everything, because a question
    stands at the end; a forward of at most this many tokens is exact. `dense_below`: blocks that
    end within the first `dense_below` tokens visit everything, too.
    """

    visited: float | None = None
    max_tokens: int | None = None
    exact_last: int = 32
    dense_below: int = 2048
    block: int = 128
    averaged: int = 16

    def __post_init__(self):
        if self.visited is None and self.max_tokens is None:
            raise ValueError("one of visited, max_tokens must be set; got none of them")
        if self.visited is not None and not (
            isinstance(self.visited, Real)
            and not isinstance(self.visited, bool)
            and 0 < self.visited <= 1
        ):
            raise ValueError(f"visited must be above 0 and at most 1; got {self.visited!r}")
        for name in ("max_tokens", "exact_last", "dense_below"):
            value = getattr(self, name)
            if value is not None and not (is_integer(value, 0) and value <= MOST):
                raise ValueError(f"{name} must be an integer in 0..{MOST}; got {value!r}")
        if not (is_integer(self.block, LEAST_BLOCK) and self.block <= MOST_BLOCK):
            raise ValueError(
                f"block must be an integer in {LEAST_BLOCK}..{MOST_BLOCK}; got {self.block!r}"
            )
        if not (is_integer(self.averaged, 1) and self.averaged <= MOST_BLOCK):
            raise ValueError(
                f"averaged must be an integer in 1..{MOST_BLOCK}; got {self.averaged!r}"
            )

    def chosen(self, before: int, length: int, always: int) -> int | None:
        """How many rows a block of `length` tokens chooses of those between sinks and window.

        `before`: tokens before the block; `always`: how many of them are sinks and window. None:
        it visits everything.
        """
        context = before + length
        most = context if self.visited is None else math.ceil(self.visited * context)
        if self.max_tokens is not None:
            most = min(most, self.max_tokens)
        if context <= self.dense_below or before - always <= 0 or most >= context:
            return None
        return max(0, most - always - length)
