"""Taking rotary position embedding (RoPE) off again.

A key is de-RoPEd once, when it enters the store, with the very `cos` and `sin` that rotated it:
dynamic-NTK and longrope change their frequencies as a sequence grows, so nothing is recomputed
from positions later. Division by `cos^2 + sin^2` undoes the scaling that yarn and longrope put
into the tables.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Derope = Callable[[Tensor, Tensor, Tensor], Tensor]


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def _rotate_interleaved(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def _unrotate(x, cos, sin, rotate, width) -> Tensor:
    cos, sin = cos.unsqueeze(1).float(), sin.unsqueeze(1).float()
    rotated = x[..., :width].float()
    plain = (rotated * cos - rotate(rotated) * sin) / (cos * cos + sin * sin)
    return torch.cat([plain, x[..., width:].float()], -1).to(x.dtype)


def derope_half(x, cos, sin):
    """Llama's layout: dimension i pairs with i + r / 2; `r = cos.shape[-1]` may be below D."""
    return _unrotate(x, cos, sin, _rotate_half, cos.shape[-1])


def derope_half_width(x, cos, sin):
    """gpt-oss: as Llama's, with tables of half the width."""
    return derope_half(x, torch.cat([cos, cos], -1), torch.cat([sin, sin], -1))


def derope_interleaved(x, cos, sin):
    """Cohere: dimension 2i pairs with 2i + 1, tables already repeated pairwise."""
    return _unrotate(x, cos, sin, _rotate_interleaved, cos.shape[-1])


def derope_interleaved_repeat(x, cos, sin):
    """GLM-4: pairs as Cohere's, tables laid out as Llama's (first half counts, repeated here)."""
    half = cos.shape[-1] // 2
    cos, sin = (t[..., :half].repeat_interleave(2, -1) for t in (cos, sin))
    return derope_interleaved(x, cos, sin)


VARIANTS: dict[str, Derope] = {
    "half": derope_half,
    "half-width": derope_half_width,
    "interleaved": derope_interleaved,
    "interleaved-repeat": derope_interleaved_repeat,
}


INTERLEAVED = ("interleaved", "interleaved-repeat")


def frequencies(
    variant: str, cos: Float[Tensor, "B T r"], sin: Float[Tensor, "B T r"]
) -> Float[Tensor, " pairs"]:
    """Radians a token by which each pair of dimensions turns, float32, from the tables of at least
    two consecutive positions."""
    step = {"half-width": slice(None), "interleaved": slice(None, None, 2)}.get(
        variant, slice(None, cos.shape[-1] // 2)
    )
    c, s = (t[0, :2, step].double() for t in (cos, sin))
    return torch.atan2(s[1] * c[0] - c[1] * s[0], c[1] * c[0] + s[1] * s[0]).float()


def identify_variant(
    apply_rope: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    cos: Float[Tensor, "B T r"],
    sin: Float[Tensor, "B T r"],
    head_dim: int,
) -> str:
    """Which of `VARIANTS` undoes `apply_rope(q, k, cos, sin)`; tried on random vectors.

    Raises ValueError when none does within 1e-4 relative error.
    """
    generator = torch.Generator().manual_seed(0)
    shape = cos.shape[0], 2, cos.shape[1], head_dim
    x = torch.randn(shape, generator=generator, dtype=torch.float32).to(cos.device)
    cos, sin = cos.float(), sin.float()
    rotated = apply_rope(x, x, cos, sin)[0]
    errors = {}
    for name, derope in VARIANTS.items():
        try:
            errors[name] = float((derope(rotated, cos, sin) - x).norm() / x.norm())
        except RuntimeError:  # table width does not fit this variant
            continue
    if errors:
        best = min(errors, key=errors.get)
        if errors[best] < 1e-4:
            return best
    found = (
        ", ".join(f"{name} leaves {error:.1e}" for name, error in errors.items()) or "none fits"
    )
    raise ValueError(
        f"the RoPE of this model must be one of {', '.join(VARIANTS)}; got another, whose keys "
        f"cannot be de-RoPEd (relative error: {found})"
    )
