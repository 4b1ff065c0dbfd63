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

Coarse words lie plane by plane (`[words, keys]`), so that a scan handles as many keys at once as a
register holds; the fine words of a key lie together.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Int32, UInt8
from torch import Tensor

CODED = 64
"""P is a multiple of it: sixteen coordinates, a word, in each group."""

PER_WORD = 16
COARSE_PLANES, FINE_PLANES = 2, 4
SIGN = 0.8
"""What a coordinate is on average, by its sign alone."""

STEP_4, STEP_2 = 0.335, 0.996
"""Steps of uniform quantizers of 16 and 4 levels with the least error for normal variables."""

BINS, BINS_PER_UNIT = 2048, 64
"""Candidates are told apart by coarse scores in steps of 1/64, down to 32 below the best."""

SCALES_PER_OCTAVE, UNIT_SCALE = 16, 128
"""A scale of s is stored as `UNIT_SCALE + 16 log2(s)`, 1 to 255; 0 is a key without direction."""


@dataclass(frozen=True)
class Codes:
    """Coded keys of B sequences: `coarse [B, Hkv, P / 32, n]`, `fine [B, Hkv, n, P / 16]` int32
    and `scale [B, Hkv, n]` uint8."""

    coarse: Int32[Tensor, "B Hkv words n"]
    fine: Int32[Tensor, "B Hkv n fine_words"]
    scale: UInt8[Tensor, "B Hkv n"]

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


def scale_table(device: torch.device | str = "cpu") -> Float[Tensor, " 256"]:
    """The scale that each byte stands for."""
    numbers = torch.arange(256, dtype=torch.float32, device=device)
    table = torch.exp2((numbers - UNIT_SCALE) / SCALES_PER_OCTAVE)
    table[0] = 0.0
    return table


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
    four = (x[..., :half] / STEP_4 + 7.5).round().clamp(0, 15).int()
    two = (x[..., half:] / STEP_2 + 1.5).round().clamp(0, 3).int()
    decoded = torch.cat([(four - 7.5) * STEP_4, (two - 1.5) * STEP_2], -1)
    own = (x * x * weight).sum(-1)
    match = (decoded * x * weight).sum(-1)
    scale = length[..., 0] * (own / match.clamp(min=torch.finfo(torch.float32).tiny)).clamp(max=4)
    stored = (UNIT_SCALE + SCALES_PER_OCTAVE * scale.log2()).round().clamp(1, 255)
    stored = torch.where(length[..., 0] > 0, stored, torch.zeros_like(stored))
    first, second, third, fourth = *four.split(group, -1), *two.split(group, -1)
    coarse = _words(_two_bits(first >> 2), _one_bit(second >> 3, third >> 1))
    fine = _words(
        _two_bits(first & 3),
        _two_bits(second >> 1 & 3),
        _one_bit(second & 1, third & 1),
        _two_bits(fourth),
    )
    coarse = coarse.transpose(-1, -2)
    return Codes(coarse.contiguous(), fine.contiguous(), stored.to(torch.uint8))


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
    return scale_table(codes.scale.device)[codes.scale.long()][..., None]


def _words(*planes: Int[Tensor, "*any n words"]) -> Int32[Tensor, "*any n all"]:
    words = torch.cat(planes, -1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def _planes(words: Int32[Tensor, "*any n all"], count: int) -> list[Int[Tensor, "*any n words"]]:
    return [plane.long() & (2**32 - 1) for plane in words.chunk(count, -1)]


def _two_bits(codes: Int[Tensor, "*any n coordinates"]) -> Int[Tensor, "*any n words"]:
    """Sixteen 2-bit codes in a word, the first in its lowest bits."""
    parts = codes.long().unflatten(-1, (-1, PER_WORD))
    return (parts << (2 * torch.arange(PER_WORD, device=codes.device))).sum(-1)


def _one_bit(
    lower: Int[Tensor, "*any n coordinates"], upper: Int[Tensor, "*any n coordinates"]
) -> Int[Tensor, "*any n words"]:
    """Sixteen bits of one group in the lower half of a word, of another in the upper half."""
    halves = [t.long().unflatten(-1, (-1, PER_WORD)) for t in (lower, upper)]
    parts = torch.cat(halves, -1)
    return (parts << torch.arange(2 * PER_WORD, device=parts.device)).sum(-1)


def _twos(words: Int[Tensor, "*any n words"]) -> Float[Tensor, "*any n coordinates"]:
    shifts = 2 * torch.arange(PER_WORD, device=words.device)
    return (words[..., None] >> shifts & 3).flatten(-2).float()


def _bits(words: Int[Tensor, "*any n words"]) -> tuple[Tensor, Tensor]:
    """The bits of the lower and of the upper halves."""
    shifts = torch.arange(2 * PER_WORD, device=words.device)
    bits = (words[..., None] >> shifts & 1).float()
    return bits[..., :PER_WORD].flatten(-2), bits[..., PER_WORD:].flatten(-2)
