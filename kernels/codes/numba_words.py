"""Sums over the codes of a word, sixteen of 2 bits or thirty-two of 1, for several query heads.

Written out by a loop over text, so that a row's word is read once, its codes are unpacked once for
all heads and the sums stay in registers; lanes are rows, which LLVM's vectoriser sees by itself.
"""

import numba
import numpy as np

from .layout import PER_WORD

_njit = numba.njit(error_model="numpy", fastmath={"contract"})


def _written_out(heads: int, bits: int):
    """`add(words, q, low, high, f_low, f_high, length, sums, first)` for so many heads g:

    `sums[first + g] += codes . q[first + g]` over the rows. The codes of the lower half of a word
    belong to q's coordinates from `low` on, times `f_low`, those of the upper half to those from
    `high` on, times `f_high`.
    """
    count = 32 // bits
    mask = (1 << bits) - 1
    lines = ["def add(words, q, low, high, f_low, f_high, length, sums, first):"]
    for g in range(heads):
        for j in range(count):
            # Codes are masked where they stand, not shifted: what they are too large by goes
            # into the query. The uppermost would be negative and is shifted.
            scale = 1.0 if j == count - 1 else 2.0 ** (-bits * j)
            half = "low" if j < count // 2 else "high"
            at = f"{half} + {j % (count // 2)}"
            lines.append(f"    q{g}_{j} = q[first + {g}, {at}] * (f_{half} * F({scale!r}))")
        lines.append(f"    s{g} = sums[first + {g}]")
    lines.append("    for r in range(length):")
    lines.append("        w = words[r]")
    for j in range(count - 1):
        lines.append(f"        c{j} = F(w & I({mask << (bits * j)}))")
    lines.append(f"        c{count - 1} = F((w >> I({32 - bits})) & I({mask}))")
    for g in range(heads):
        terms = " + ".join(f"q{g}_{j} * c{j}" for j in range(count))
        lines.append(f"        s{g}[r] += {terms}")
    space = {"F": np.float32, "I": np.int32}
    exec("\n".join(lines), space)
    return _njit(space["add"])


_two_1, _two_2, _two_3, _two_4 = (_written_out(heads, 2) for heads in range(1, 5))
_one_1, _one_2, _one_3, _one_4 = (_written_out(heads, 1) for heads in range(1, 5))


@_njit
def add_twos(words, q, at, factor, length, group, sums):
    """`sums[g, r] += factor * sum over j of q[g, at + j] * 2-bit code j of words[r]`."""
    low, high, f = at, at + PER_WORD // 2, factor
    first = 0
    while first < group:
        left = group - first
        if left >= 4:
            _two_4(words, q, low, high, f, f, length, sums, first)
        elif left == 3:
            _two_3(words, q, low, high, f, f, length, sums, first)
        elif left == 2:
            _two_2(words, q, low, high, f, f, length, sums, first)
        else:
            _two_1(words, q, low, high, f, f, length, sums, first)
        first += min(left, 4)


@_njit
def add_bits(words, q, low, high, f_low, f_high, length, group, sums):
    """As `add_twos` for single bits: the halves of a word belong to two groups of coordinates."""
    first = 0
    while first < group:
        left = group - first
        if left >= 4:
            _one_4(words, q, low, high, f_low, f_high, length, sums, first)
        elif left == 3:
            _one_3(words, q, low, high, f_low, f_high, length, sums, first)
        elif left == 2:
            _one_2(words, q, low, high, f_low, f_high, length, sums, first)
        else:
            _one_1(words, q, low, high, f_low, f_high, length, sums, first)
        first += min(left, 4)
