"""De-RoPEing: exact for every layout, chosen by trial, refused when none fits."""

import pytest
import torch

from saap.rope import VARIANTS, identify_variant


def tables(width, scaling=1.0, length=12):
    angles = torch.arange(length)[:, None] * 100.0 ** (-torch.arange(width // 2) / (width // 2))
    angles = torch.cat([angles, angles], -1)[None]
    return angles.cos() * scaling, angles.sin() * scaling


def rotate_half(x):
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def llama(q, k, cos, sin):
    def turn(x):
        r = cos.shape[-1]
        part = x[..., :r]
        part = part * cos[:, None] + rotate_half(part) * sin[:, None]
        return torch.cat([part, x[..., r:]], -1)

    return turn(q), turn(k)


@pytest.mark.parametrize("width", [16, 8])
@pytest.mark.parametrize("scaling", [1.0, 1.139])
def test_half_layout_is_undone(width, scaling):
    cos, sin = tables(width, scaling)
    x = torch.randn(2, 3, 12, 16)
    rotated, _ = llama(x, x, cos, sin)
    assert identify_variant(llama, cos, sin, 16) == "half"
    error = (VARIANTS["half"](rotated, cos, sin) - x).norm() / x.norm()
    assert error < 1e-6


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        ("llama", "half"), ("qwen3", "half"), ("phi3", "half"), ("gemma2", "half"),
        ("cohere", "interleaved"), ("glm4", "interleaved-repeat"), ("gpt_oss", "half-width"),
    ],
)  # fmt: skip
def test_families_of_transformers(family, variant):
    import importlib

    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    cos, sin = tables(16)
    if variant == "interleaved":
        half = torch.arange(16) // 2
        cos, sin = cos[..., half], sin[..., half]
    if variant == "half-width":
        cos, sin = cos[..., :8], sin[..., :8]
    assert identify_variant(module.apply_rotary_pos_emb, cos, sin, 16) == variant


def test_unknown_rotation_is_refused():
    cos, sin = tables(16)
    with pytest.raises(ValueError, match="must be one of half, half-width"):
        identify_variant(lambda q, k, c, s: (q.flip(-1) * c[:, None], k), cos, sin, 16)
