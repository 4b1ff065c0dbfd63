"""From coordinates of keys to codes, written where the rows of a context keep theirs."""

import importlib
from types import ModuleType

import torch
from jaxtyping import Float, Int32, UInt8
from torch import Tensor

from saap.kernels.backends import installed

from .layout import (
    COARSE,
    COARSE_PLACE,
    COARSE_STEPS,
    COARSE_ZEROS,
    FINE,
    GROUPS,
    SCALE_BASE,
    SCALE_SHIFT,
    WHOLE_STEPS,
    WHOLE_ZEROS,
    Codes,
    grouped,
    of_coordinates,
)

BACKENDS = ("numba", "triton")

SIZES = (1.0, 0.7, 0.85, 1.2, 1.4)
"""By which a key's coordinates are multiplied before they are rounded: the one that serves best.
Beyond the last step of a quantizer errors grow, so a key with a few large coordinates is made
smaller; its scale makes up for that."""

COARSE_GAINS = (0.898, 0.638, 0.638, *(GROUPS - 3) * (0.0,))
"""What the coarse code of a normal variable says of it: the mean of their product."""

COARSE_COST = 0.05
"""What it costs that a coarse code says more or less of a key than it does of others, beside the
error of the whole code: the squares of both, relative, are added."""

LARGEST_CORRECTION = 4.0
"""Of a key's scale, where hardly anything of it could be coded."""


def encode(x: Float[Tensor, "B Hkv n P"], importance: Float[Tensor, "#B Hkv P"]) -> Codes:
    """Code the coordinates `x` of keys; they have unit variance over all keys.

    `importance`: what an error of each coordinate counts in a score. A key is rounded at each of
    `SIZES`, and that is kept which errs least. A key's own scale makes its coded inner product
    right in the mean, as in RaBitQ (Gao and Long, arXiv 2405.12497). NaN counts as 0.
    """
    tiny = torch.finfo(torch.float32).tiny
    x = torch.nan_to_num(x.float(), nan=0.0, posinf=0.0, neginf=0.0)
    weight = importance.float()[:, :, None]
    length = ((x * x * weight).sum(-1, keepdim=True) / weight.sum(-1, keepdim=True)).sqrt()
    x = x / length.clamp(min=tiny)
    own = (x * x * weight).sum(-1)
    usual = (of_coordinates(COARSE_GAINS, x) * weight).sum(-1) / weight.sum(-1)
    best = None
    for size in SIZES:
        levels, match, cost = _rounded(size * x, x, weight, own, usual)
        if best is None:
            best, kept, matches = cost, levels, match
            continue
        better = cost < best
        best, matches = torch.where(better, cost, best), torch.where(better, match, matches)
        kept = torch.where(better[..., None], levels, kept)
    scale = length[..., 0] * (own / matches.clamp(min=tiny)).clamp(max=LARGEST_CORRECTION)
    levels = grouped(kept)
    coarse = _packed(levels, COARSE)
    fine = torch.cat([_packed(levels, parts) for parts in FINE], -1)
    return Codes(coarse.transpose(-1, -2).contiguous(), fine, _stored(scale))


def _rounded(
    sized: Tensor, x: Tensor, weight: Tensor, own: Tensor, usual: Tensor
) -> tuple[Tensor, ...]:
    """Codes of `sized`, uint8; the inner product of what they stand for with the key x, whose own
    is `own`; what they cost, where a coarse code says `usual` of a key."""
    tiny = torch.finfo(torch.float32).tiny
    step, zero, coarse_step, coarse_zero = (
        of_coordinates(t, x) for t in (WHOLE_STEPS, WHOLE_ZEROS, COARSE_STEPS, COARSE_ZEROS)
    )
    levels = torch.minimum((sized / step + zero).round().clamp(min=0), 2 * zero)
    whole = (levels - zero) * step
    match, square = ((whole * other * weight).sum(-1) for other in (x, whole))
    coarse = ((levels / 2**COARSE_PLACE).floor() - coarse_zero) * coarse_step
    said = (coarse * x * weight).sum(-1) / match.clamp(min=tiny)
    error = 1 - match * match / (square * own).clamp(min=tiny)
    return levels.to(torch.uint8), match, error + COARSE_COST * (said / usual - 1) ** 2


def _stored(scale: Float[Tensor, "*any"]) -> UInt8[Tensor, "*any"]:
    half = 1 << (SCALE_SHIFT - 1)
    bits = (scale.contiguous().view(torch.int32) + half - SCALE_BASE) >> SCALE_SHIFT
    return bits.clamp(0, 255).to(torch.uint8)


def _packed(levels: UInt8[Tensor, "*any 8 words 2 4"], parts) -> Int32[Tensor, "*any words"]:
    packed = torch.zeros_like(levels[..., 0, :, 0, :])
    for part in parts:
        own = levels[..., part.group, :, part.four, :]
        packed |= (own >> part.place & part.mask) << part.bit
    return packed.view(torch.int32)[..., 0]


def encode_rows(
    x: Float[Tensor, "Hkv n P"],
    importance: Float[Tensor, "Hkv P"],
    codes: Codes,
    sequence: int,
    first: int,
    *,
    impl: str | None = None,
) -> None:
    """Code keys as `encode` does, into the rows of one sequence from `first` on.

    Args:
        x: float32 coordinates of keys, of unit variance over all keys. NaN and infinities count
            as 0.
        importance: float32, what an error of each coordinate counts in a score.
        codes: what is written to, on the device of x.
        impl: `"reference"`, `"numba"` (CPU), `"triton"` (GPU, or its interpreter), or None, the
            best that can do it. They differ where a sum's last bit decides how something is
            rounded.

    Raises:
        ValueError: shapes that do not fit, rows that are not there, another `impl`.
    """
    batch, n_kv, held = codes.scale.shape
    n = x.shape[1]
    if x.shape != (n_kv, n, codes.coordinates) or importance.shape != (n_kv, codes.coordinates):
        raise ValueError(
            f"x and importance must be [{n_kv}, n, {codes.coordinates}] and "
            f"[{n_kv}, {codes.coordinates}]; got {tuple(x.shape)} and {tuple(importance.shape)}"
        )
    if x.dtype != torch.float32 or importance.dtype != torch.float32:
        raise ValueError(f"x and importance must be float32; got {x.dtype} and {importance.dtype}")
    if not (0 <= sequence < batch and 0 <= first <= first + n <= held):
        raise ValueError(
            f"rows must be in 0..{held} of sequence 0..{batch - 1}; got {first} to {first + n} of "
            f"sequence {sequence}"
        )
    backend = _backend(impl, x, importance, codes)
    if n == 0:
        return
    if backend is not None:
        backend.encode_rows(x, importance, codes, sequence, first)
        return
    new, rows = encode(x[None], importance[None]), slice(first, first + n)
    codes.coarse[sequence, ..., rows] = new.coarse[0]
    codes.fine[sequence, :, rows] = new.fine[0]
    codes.scale[sequence, :, rows] = new.scale[0]


def _backend(impl: str | None, x: Tensor, importance: Tensor, codes: Codes) -> ModuleType | None:
    """The module that codes these keys; None for `encode`."""
    if impl not in (None, "reference", *BACKENDS):
        raise ValueError(
            f"impl must be None or one of reference, {', '.join(BACKENDS)}; got {impl!r}"
        )
    name = impl or ("numba" if x.device.type == "cpu" else "triton")
    if name == "reference":
        return None
    refused, module = f"impl {name!r} needs the package {name}; it is not installed", None
    if installed(name):
        module = importlib.import_module(f".{name}_coding", __package__)
        refused = module.limit(x) or codes.fault or codes.misplaced(x.device)
        if importance.device != x.device:
            refused = f"importance must be on {x.device}, as x; got {importance.device}"
    if refused is None or impl is None:
        return module if refused is None else None
    raise ValueError(refused)
