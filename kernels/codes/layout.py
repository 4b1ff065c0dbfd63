"""The layout of coded keys: from coordinates of unit variance to words of 2-bit and 1-bit codes.

A key has P coordinates in four groups of P / 4, the most important ones first. Those of the first
two groups have 4 bits, the others 2, and a scale of one byte is the key's own. The upper 2 bits of
the first group and the signs of the second and third are the *coarse* code: P / 8 bytes per key,
which a step reads of every key. The other bits, P / 4 bytes, are the *fine* code, which it reads
of the keys that the coarse one lets through. Signs cost little and see most directions: a coarse
code of the first group alone loses what a rare query asks for.

Codes are packed into int32 words, sixteen of 2 bits or thirty-two of 1 bit, for 64 coordinates:

    coarse   upper 2 bits of group 0 | signs of group 1 and of group 2
    fine     lower 2 bits of group 0 | middle 2 of group 1 | last of group 1 and of 2 | group 3

Four codes that follow one another lie in the four bytes of a word, at the same place in each: one
shift and one mask make them the bytes that a processor multiplies and adds up in one instruction.
Coarse words lie plane by plane (`[words, keys]`), so that a scan handles as many keys at once as a
register holds; the fine words of a key lie together.
"""

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Int32, UInt8
from torch import Tensor

CODED = 64
"""P is a multiple of it: sixteen coordinates, a word, in each group."""

PER_WORD, BYTES = 16, 4
COARSE_PLANES, FINE_PLANES = 2, 4
SIGN = 0.8
"""What a coordinate is on average, by its sign alone."""

STEP_4, STEP_2 = 0.335, 0.996
"""Steps of uniform quantizers of 16 and 4 levels with the least error for normal variables."""

WHOLE_STEPS, COARSE_STEPS = (STEP_4, STEP_4, STEP_2, STEP_2), (4 * STEP_4, 2 * SIGN, 2 * SIGN, 0.0)
"""Of each group of coordinates."""

WHOLE_ZEROS, COARSE_ZEROS = (7.5, 7.5, 1.5, 1.5), (1.5, 0.5, 0.5, 0.0)
"""The code that would stand for 0."""

SCALE_SHIFT, SCALE_BASE = 19, (127 - 8) << 23
"""A scale is stored as a byte b, the float32 with the bits `(b << 19) + SCALE_BASE`: four bits of
exponent and four of mantissa, from 2**-8 to 248."""

QUERY_MAX = 127
"""Queries are rounded to whole numbers of a byte, with a scale for each head."""


@dataclass(frozen=True)
class Codes:
    """Coded keys of B sequences: `coarse [B, Hkv, P / 32, n]`, `fine [B, Hkv, n, P / 16]` int32
    and `scale [B, Hkv, n]` uint8."""

    coarse: Int32[Tensor, "B Hkv words n"]
    fine: Int32[Tensor, "B Hkv n fine_words"]
    scale: UInt8[Tensor, "B Hkv n"]

    @functools.cached_property
    def fault(self) -> str | None:
        """What of shapes and dtypes does not fit together, or None."""
        batch, n_kv, n = self.scale.shape
        words = self.coarse.shape[2] // COARSE_PLANES
        expected = {
            "coarse": (batch, n_kv, COARSE_PLANES * words, n),
            "fine": (batch, n_kv, n, FINE_PLANES * words),
        }
        for name, shape in expected.items():
            found = tuple(getattr(self, name).shape)
            if found != shape:
                return f"codes.{name} must be {shape}, as coarse and scale say; got {found}"
            if getattr(self, name).dtype != torch.int32 or self.scale.dtype != torch.uint8:
                return "codes must be int32 words and uint8 scales; got other dtypes"
        return None

    @functools.cached_property
    def strided(self) -> str | None:
        """What kernels cannot read because it does not lie together, or None."""
        for name in ("coarse", "fine", "scale"):
            tensor = getattr(self, name)
            if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
                return f"codes.{name} must be contiguous in its last dimension; got strides"
        if self.fine.stride(2) != self.fine.shape[3]:
            return "the fine words of a key must follow those of the one before; got strides"
        return None

    def misplaced(self, device: torch.device) -> str | None:
        """Why kernels on this device cannot read the codes, or None."""
        for name in ("coarse", "fine", "scale"):
            found = getattr(self, name).device
            if found != device:
                return f"codes.{name} must be on q's device, {device}; got {found}"
        return self.strided

    @property
    def n(self) -> int:
        return self.scale.shape[2]

    @property
    def coordinates(self) -> int:
        """P."""
        return CODED * self.coarse.shape[2] // COARSE_PLANES

    @property
    def coarse_bytes(self) -> int:
        """Bytes that a step reads of every key: coarse code and scale."""
        return 4 * self.coarse.shape[2] + 1

    @property
    def fine_bytes(self) -> int:
        """Bytes that it reads beside those of each key that the coarse code lets through."""
        return 4 * self.fine.shape[3]


def scales_of(stored: UInt8[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """The scales that bytes stand for."""
    return ((stored.int() << SCALE_SHIFT) + SCALE_BASE).view(torch.float32)


def _stored(scale: Float[Tensor, "*any"]) -> UInt8[Tensor, "*any"]:
    half = 1 << (SCALE_SHIFT - 1)
    bits = (scale.contiguous().view(torch.int32) + half - SCALE_BASE) >> SCALE_SHIFT
    return bits.clamp(0, 255).to(torch.uint8)


def encode(x: Float[Tensor, "B Hkv n P"], importance: Float[Tensor, "#B Hkv P"]) -> Codes:
    """Code the coordinates `x` of keys; they have unit variance over all keys.

    `importance`: what an error of each coordinate counts in a score. A key's own scale makes its
    coded inner product right in the mean, as in RaBitQ (Gao and Long, arXiv 2405.12497). NaN
    counts as 0.
    """
    x = torch.nan_to_num(x.float(), nan=0.0, posinf=0.0, neginf=0.0)
    weight = importance.float()[:, :, None]
    length = ((x * x * weight).sum(-1, keepdim=True) / weight.sum(-1, keepdim=True)).sqrt()
    x = x / length.clamp(min=torch.finfo(torch.float32).tiny)
    half, group = x.shape[-1] // 2, x.shape[-1] // 4
    four = (x[..., :half] / STEP_4 + 7.5).round().clamp(0, 15).to(torch.uint8)
    two = (x[..., half:] / STEP_2 + 1.5).round().clamp(0, 3).to(torch.uint8)
    decoded = torch.cat([(four - 7.5) * STEP_4, (two - 1.5) * STEP_2], -1)
    own = (x * x * weight).sum(-1)
    match = (decoded * x * weight).sum(-1)
    scale = length[..., 0] * (own / match.clamp(min=torch.finfo(torch.float32).tiny)).clamp(max=4)
    first, second, third, fourth = *four.split(group, -1), *two.split(group, -1)
    coarse = torch.cat([_two_bits(first >> 2), _one_bit(second >> 3, third >> 1)], -1)
    parts = [
        _two_bits(first & 3),
        _two_bits(second >> 1 & 3),
        _one_bit(second & 1, third & 1),
        _two_bits(fourth),
    ]
    return Codes(coarse.transpose(-1, -2).contiguous(), torch.cat(parts, -1), _stored(scale))


def decode(codes: Codes) -> Float[Tensor, "B Hkv n P"]:
    """The coordinates that the codes stand for."""
    coarse = _planes(codes.coarse.transpose(-1, -2), COARSE_PLANES)
    fine = _planes(codes.fine, FINE_PLANES)
    signs, last = _bits(coarse[1]), _bits(fine[2])
    first = (4 * _twos(coarse[0]) + _twos(fine[0]) - 7.5) * STEP_4
    second = (8 * signs[0] + 2 * _twos(fine[1]) + last[0] - 7.5) * STEP_4
    third = (2 * signs[1] + last[1] - 1.5) * STEP_2
    fourth = (_twos(fine[3]) - 1.5) * STEP_2
    return torch.cat([first, second, third, fourth], -1) * _scales(codes)


def decode_coarse(codes: Codes) -> Float[Tensor, "B Hkv n P"]:
    """The coordinates that the coarse code alone stands for; those of the last group are 0."""
    coarse = _planes(codes.coarse.transpose(-1, -2), COARSE_PLANES)
    first = (4 * _twos(coarse[0]) - 6.0) * STEP_4
    second, third = ((2 * bit - 1) * SIGN for bit in _bits(coarse[1]))
    return torch.cat([first, second, third, 0 * first], -1) * _scales(codes)


def _scales(codes: Codes) -> Float[Tensor, "B Hkv n 1"]:
    return scales_of(codes.scale)[..., None]


def _planes(words: Int32[Tensor, "*any n all"], count: int) -> list[Int[Tensor, "*any n words"]]:
    return [plane.long() & (2**32 - 1) for plane in words.chunk(count, -1)]


def _two_bits(codes: UInt8[Tensor, "*any n coordinates"]) -> Int32[Tensor, "*any n words"]:
    """Sixteen 2-bit codes in a word: code j in byte j % 4, from bit 2 (j // 4) on."""
    return _packed(codes.unflatten(-1, (-1, BYTES, BYTES)), 2)


def _one_bit(
    lower: UInt8[Tensor, "*any n coordinates"], upper: UInt8[Tensor, "*any n coordinates"]
) -> Int32[Tensor, "*any n words"]:
    """Sixteen bits of one group and sixteen of another: bit j in byte j % 4, as bit j // 4."""
    halves = [t.unflatten(-1, (-1, BYTES, BYTES)) for t in (lower, upper)]
    return _packed(torch.cat(halves, -2), 1)


def _packed(codes: UInt8[Tensor, "*any words steps 4"], bits: int) -> Int32[Tensor, "*any words"]:
    each = codes.unbind(-2)
    packed = each[0].clone()
    for step, own in enumerate(each[1:], 1):
        packed |= own << (bits * step)
    return packed.view(torch.int32)[..., 0]


def _places(bits: int, count: int, device: torch.device) -> Int[Tensor, " count"]:
    """The bit at which each code of a word begins."""
    number = torch.arange(count, device=device)
    return number % BYTES * 8 + number // BYTES * bits


def _twos(words: Int[Tensor, "*any n words"]) -> Float[Tensor, "*any n coordinates"]:
    places = _places(2, PER_WORD, words.device)
    return (words[..., None] >> places & 3).flatten(-2).float()


def _bits(words: Int[Tensor, "*any n words"]) -> tuple[Tensor, Tensor]:
    """The bits of the first and of the second group."""
    bits = (words[..., None] >> _places(1, 2 * PER_WORD, words.device) & 1).float()
    return bits[..., :PER_WORD].flatten(-2), bits[..., PER_WORD:].flatten(-2)
