"""`coding.encode` on a GPU, a key in each program: one launch, however many keys there are.

On CPU tensors it runs in Triton's interpreter, if `TRITON_INTERPRET=1` was set before triton was
imported.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from saap.kernels.backends.launches import Launch, launch_all

from .coding import COARSE_COST, COARSE_GAINS, LARGEST_CORRECTION, SIZES
from .layout import (
    COARSE,
    COARSE_PLACE,
    COARSE_STEPS,
    COARSE_ZEROS,
    CODED,
    FINE,
    FINE_PLANES,
    GROUPS,
    SCALE_BASE,
    SCALE_SHIFT,
    WHOLE_STEPS,
    WHOLE_ZEROS,
    Codes,
)

_GROUPS, _PLANES, _N_SIZES = (tl.constexpr(n) for n in (GROUPS, FINE_PLANES, len(SIZES)))
_PLACE, _SHIFT = tl.constexpr(COARSE_PLACE), tl.constexpr(SCALE_SHIFT)
_BASE = tl.constexpr(SCALE_BASE - (1 << (SCALE_SHIFT - 1)))  # rounds
_COST, _LARGEST = tl.constexpr(COARSE_COST), tl.constexpr(float(LARGEST_CORRECTION))
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: added and taken off, what is left is whole


def limit(x: Tensor) -> str | None:
    """What of validated arguments this backend cannot do, or None."""
    if x.device.type == "cuda" or not isinstance(encode_keys, triton.JITFunction):
        return None
    return (
        f"x must be on a CUDA device for impl 'triton'; got {x.device}: use one, or set "
        "TRITON_INTERPRET=1 before triton is imported"
    )


def encode_rows(x: Tensor, importance: Tensor, codes: Codes, sequence: int, first: int) -> None:
    """As `coding.encode_rows`, whose checks are taken for granted."""
    launch_all([encoding(x, importance, codes, sequence, first)], x)


def encoding(x: Tensor, importance: Tensor, codes: Codes, sequence: int, first: int) -> Launch:
    """The kernel of `encode_rows` with all its arguments."""
    heads, n, coordinates = x.shape
    coarse, fine, scale = (t[sequence] for t in (codes.coarse, codes.fine, codes.scale))
    words = coordinates // CODED
    return Launch(
        encode_keys, (n, heads),
        {
            "x": x.detach().resolve_neg().contiguous(),
            "importance": importance.detach().resolve_neg().contiguous(),
            "tables": _tables(x.device), "parts": _parts(x.device),
            "coarse": coarse[:, :, first:], "fine": fine[:, first:], "scale": scale[:, first:],
            "n": n, "coarse_head": coarse.stride(0), "coarse_plane": coarse.stride(1),
            "fine_head": fine.stride(0), "scale_head": scale.stride(0),
            "N_WORDS": words, "WORDS": triton.next_power_of_2(words),
        },
        {"num_warps": 1},
    )  # fmt: skip


@functools.lru_cache(maxsize=16)
def _tables(device: torch.device) -> Tensor:
    """float32 `[5 * 8 + sizes]`: of each group steps, zeros, coarse steps and zeros, gains."""
    of_groups = WHOLE_STEPS, WHOLE_ZEROS, COARSE_STEPS, COARSE_ZEROS, COARSE_GAINS
    return torch.tensor([*(number for own in of_groups for number in own), *SIZES], device=device)


@functools.lru_cache(maxsize=16)
def _parts(device: torch.device) -> Tensor:
    """int32 `[1 + 5, 8, 2, 3]`: what the words of each plane, the coarse one first, take of codes
    of a group's first and last four: from which bit on, a mask (0: nothing), and to where."""
    table = torch.zeros(1 + FINE_PLANES, GROUPS, 2, 3, dtype=torch.int32)
    for plane, parts in enumerate((COARSE, *FINE)):
        for part in parts:
            own = torch.tensor([part.place, part.mask, part.bit], dtype=torch.int32)
            table[plane, part.group, part.four] = own
    return table.to(device)


@triton.jit
def _total(x):
    return tl.sum(tl.sum(tl.sum(x, 2), 1), 0)


@triton.jit
def encode_keys(
    x, importance, tables, parts, coarse, fine, scale, n, coarse_head, coarse_plane, fine_head,
    scale_head, N_WORDS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """One key of one KV head, whose codes are written.

    x: float32 `[Hkv, n, P]`; importance: float32 `[Hkv, P]`; coarse, fine, scale: those of the
    first key. Strides are in elements.
    """
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    g = tl.arange(0, _GROUPS)[:, None, None]
    w = tl.arange(0, WORDS)[None, :, None]
    j = tl.arange(0, 8)[None, None, :]
    size: tl.constexpr = 8 * N_WORDS  # of a group
    held = (g >= 0) & (w < N_WORDS) & (j >= 0)
    place = g * size + w * 8 + j
    weight = tl.load(importance + head * (_GROUPS * size) + place, held, other=0.0)
    key = tl.load(x + (head * n + row) * (_GROUPS * size) + place, held, other=0.0)
    key = tl.where(tl.abs(key) < float("inf"), key, 0.0)  # NaN is not below infinity, either
    step, zero = tl.load(tables + g), tl.load(tables + _GROUPS + g)
    coarse_step = tl.load(tables + 2 * _GROUPS + g)
    coarse_zero = tl.load(tables + 3 * _GROUPS + g)
    gain = tl.load(tables + 4 * _GROUPS + g)
    weights = _total(weight)
    usual = tl.div_rn(_total(gain * weight), weights)
    length = tl.sqrt_rn(tl.div_rn(_total(key * key * weight), weights))
    key = tl.div_rn(key, tl.maximum(length, _TINY))
    own = _total(key * key * weight)
    for i in tl.static_range(_N_SIZES):
        sized = tl.div_rn(tl.load(tables + 5 * _GROUPS + i) * key, step) + zero
        # Rounding to whole numbers by adding is right for small ones.
        level = tl.minimum(tl.maximum(sized, 0.0), 2 * zero) + _ROUND
        level = level - _ROUND
        whole = (level - zero) * step
        match = _total(whole * key * weight)
        square = _total(whole * whole * weight)
        number = level.to(tl.int32)
        said = ((number >> _PLACE).to(tl.float32) - coarse_zero) * coarse_step
        said = tl.div_rn(_total(said * key * weight), tl.maximum(match, _TINY))
        odd = tl.div_rn(said, usual) - 1.0
        error = 1.0 - tl.div_rn(match * match, tl.maximum(square * own, _TINY))
        cost = error + _COST * odd * odd
        if i == 0:
            best, best_match, kept = cost, match, number
        else:
            better = cost < best
            best, best_match = tl.where(better, cost, best), tl.where(better, match, best_match)
            kept = tl.where(better, number, kept)
    correction = tl.div_rn(own, tl.maximum(best_match, _TINY))
    stored = length * tl.minimum(correction, _LARGEST)
    stored = (stored.to(tl.int32, bitcast=True) - _BASE) >> _SHIFT
    stored = tl.minimum(tl.maximum(stored, 0), 255)
    tl.store(scale + head * scale_head + row, stored.to(tl.uint8))
    word = tl.arange(0, WORDS)
    for plane in tl.static_range(1 + _PLANES):
        about = parts + ((plane * _GROUPS + g) * 2 + j // 4) * 3
        bits = (kept >> tl.load(about)) & tl.load(about + 1)
        bits = bits << (tl.load(about + 2) + 8 * (j % 4))
        packed = tl.sum(tl.sum(tl.where(held, bits, 0), 2), 0)
        if plane == 0:
            place_of = coarse + head * coarse_head + word * coarse_plane + row
        else:
            place_of = fine + head * fine_head + (row * _PLANES + plane - 1) * N_WORDS + word
        tl.store(place_of, packed, word < N_WORDS)
