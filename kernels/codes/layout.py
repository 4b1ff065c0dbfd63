"""The layout of coded keys: from coordinates of unit variance to words of a few bits for each.

A key has P coordinates in eight groups of P / 8, the most important ones first. Their codes have
5, 4, 4, 3, 3, 2, 2 bits and 1, and a scale of one byte is the key's own. The upper 2 bits of the
first group and the signs of the next two are the *coarse* code, which a step reads of every key:
half a bit for each coordinate, and the scale. The other bits are the *fine* code, five times as
many, which it reads of the keys that the coarse one lets through. Signs cost little and see many
directions: a coarse code of the first group alone loses what a rare query asks for.

Codes are packed into int32 words, one coarse word and five fine ones for each eight coordinates of
every group. A word is four equal bytes; of the word's eight coordinates a byte has two, one of the
first four and one of the last four:

    coarse   2 upper bits of group 0 | signs of group 1 | of group 2
    fine 0   3 lower bits of group 0 | 2 bits of group 5 (of the first four coordinates)
    fine 1   3 lower bits of group 1 | 2 bits of group 5 (of the last four)
    fine 2   3 lower bits of group 2 | 2 bits of group 6 (of the first four)
    fine 3   3 bits of group 3       | 2 bits of group 6 (of the last four)
    fine 4   3 bits of group 4       | signs of group 7

Codes of four coordinates that follow one another lie in the four bytes, at the same place in each:
one shift and one mask make them the bytes that a processor multiplies and adds up in one
instruction. Coarse words lie plane by plane (`[words, keys]`), so that a scan handles as many keys
at once as a register holds; the fine words of a key lie together.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Int32, UInt8
from torch import Tensor

GROUPS, FINE_PLANES = 8, 5
BYTES, PER_WORD = 4, 8
"""Bytes of a word; coordinates of each group that a word has a part of."""

CODED = GROUPS * PER_WORD
"""P is a multiple of it."""

BITS = (5, 4, 4, 3, 3, 2, 2, 1)
"""Of a coordinate's code, in each group."""

SIGN = 0.8
"""What a coordinate is on average, by its sign alone."""

WHOLE_STEPS = (0.13, 0.3, 0.3, 0.55, 0.55, 0.95, 0.95, 2 * SIGN)
"""Of uniform quantizers. A normal variable would lose least with somewhat wider ones (0.188 for 5
bits), whose upper 2 bits hardly tell keys apart that most keys are like: candidates get lost."""

COARSE_STEPS = (8 * WHOLE_STEPS[0], 2 * SIGN, 2 * SIGN, *(GROUPS - 3) * (0.0,))
WHOLE_ZEROS = tuple((2**bits - 1) / 2 for bits in BITS)
"""The code that would stand for 0."""

COARSE_ZEROS = (1.5, 0.5, 0.5, *(GROUPS - 3) * (0.0,))

SCALE_SHIFT, SCALE_BASE = 18, (127 - 4) << 23
"""A scale is stored as a byte b, the float32 with the bits `(b << 18) + SCALE_BASE`: three bits of
exponent and five of mantissa, from 2**-4 to 15.75. Those of nearly all keys are near 1."""

QUERY_MAX = 127
"""Queries are rounded to whole numbers of a byte, with a scale for each head."""


class Part(NamedTuple):
    """What a word holds of the codes of four coordinates, one in each of its bytes."""

    bit: int  # of the byte, where it begins
    bits: int
    group: int  # of the coordinates
    four: int  # the first (0) or the last (1) of the word's eight
    place: int  # bit of the code where it begins

    @property
    def mask(self) -> int:
        return (1 << self.bits) - 1


def _of_eight(bit: int, bits: int, group: int, place: int) -> tuple[Part, Part]:
    return tuple(Part(bit + bits * four, bits, group, four, place) for four in (0, 1))


COARSE_PLACE = 3
"""Bit of a code of groups 0 to 2 where its coarse part begins."""

COARSE = (
    *_of_eight(0, 2, 0, COARSE_PLACE),
    *_of_eight(4, 1, 1, COARSE_PLACE),
    *_of_eight(6, 1, 2, COARSE_PLACE),
)
FINE = (
    (*_of_eight(0, 3, 0, 0), Part(6, 2, 5, 0, 0)),
    (*_of_eight(0, 3, 1, 0), Part(6, 2, 5, 1, 0)),
    (*_of_eight(0, 3, 2, 0), Part(6, 2, 6, 0, 0)),
    (*_of_eight(0, 3, 3, 0), Part(6, 2, 6, 1, 0)),
    (*_of_eight(0, 3, 4, 0), *_of_eight(6, 1, 7, 0)),
)
"""Parts of a coarse word, and of the words of each fine plane."""


def candidates_of(n_rows: int, n_candidates: int, one_of: int | None) -> int:
    """How many of a sequence's rows each head lets through; more than there are means all."""
    return max(n_candidates, -(-n_rows // one_of)) if one_of else n_candidates


def coordinates_for(dim: int) -> int:
    """P for vectors of so many dimensions; where these are fewer, others are 0."""
    return CODED * -(-dim // CODED)


@dataclass(frozen=True)
class Codes:
    """Coded keys of B sequences: `coarse [B, Hkv, P / 64, n]`, `fine [B, Hkv, n, 5 P / 64]` int32
    and `scale [B, Hkv, n]` uint8."""

    coarse: Int32[Tensor, "B Hkv words n"]
    fine: Int32[Tensor, "B Hkv n fine_words"]
    scale: UInt8[Tensor, "B Hkv n"]

    @staticmethod
    def shapes(batch: int, n_kv: int, coordinates: int, n: int) -> dict[str, tuple]:
        """Of each tensor its shape and its dtype."""
        words = coordinates // CODED
        return {
            "coarse": ((batch, n_kv, words, n), torch.int32),
            "fine": ((batch, n_kv, n, FINE_PLANES * words), torch.int32),
            "scale": ((batch, n_kv, n), torch.uint8),
        }

    @classmethod
    def empty(cls, batch: int, n_kv: int, dim: int, n: int, device: torch.device) -> "Codes":
        """Room for n keys of so many dimensions, all 0."""
        shapes = cls.shapes(batch, n_kv, coordinates_for(dim), n)
        return cls(
            **{name: torch.zeros(s, dtype=t, device=device) for name, (s, t) in shapes.items()}
        )

    @functools.cached_property
    def fault(self) -> str | None:
        """What of shapes and dtypes does not fit together, or None."""
        expected = self.shapes(*self.scale.shape[:2], self.coordinates, self.n)
        for name, (shape, dtype) in expected.items():
            own = getattr(self, name)
            found = tuple(own.shape)
            if found != shape:
                return f"codes.{name} must be {shape}, as coarse and scale say; got {found}"
            if own.dtype != dtype:
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
        return CODED * self.coarse.shape[2]

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


def decode(codes: Codes) -> Float[Tensor, "B Hkv n P"]:
    """The coordinates that the codes stand for."""
    fine = codes.fine.chunk(FINE_PLANES, -1)
    words = [(codes.coarse.transpose(-1, -2), COARSE), *zip(fine, FINE, strict=True)]
    return _coordinates(codes, _levels(words), WHOLE_STEPS, WHOLE_ZEROS)


def decode_coarse(codes: Codes) -> Float[Tensor, "B Hkv n P"]:
    """The coordinates that the coarse code alone stands for; those of the last groups are 0."""
    coarse = [part._replace(place=0) for part in COARSE]
    levels = _levels([(codes.coarse.transpose(-1, -2), coarse)])
    return _coordinates(codes, levels, COARSE_STEPS, COARSE_ZEROS)


def of_coordinates(numbers: tuple[float, ...], like: Tensor) -> Float[Tensor, " P"]:
    """A number for each group as one for each coordinate of the last dimension of `like`."""
    own = torch.tensor(numbers, device=like.device, dtype=like.dtype)
    return own.repeat_interleave(like.shape[-1] // GROUPS)


def _coordinates(codes: Codes, levels: Tensor, steps: tuple, zeros: tuple) -> Tensor:
    levels = levels.float()
    step, zero = (of_coordinates(t, levels) for t in (steps, zeros))
    return (levels - zero) * step * scales_of(codes.scale)[..., None]


def grouped(levels: Int[Tensor, "*any P"]) -> Int[Tensor, "*any 8 words 2 4"]:
    return levels.unflatten(-1, (GROUPS, -1, PER_WORD // BYTES, BYTES))


def _levels(words: list[tuple[Int32[Tensor, "*any words"], tuple]]) -> Int32[Tensor, "*any P"]:
    """Codes of all coordinates, of which each of the words has its parts."""
    shape = *words[0][0].shape[:-1], CODED * words[0][0].shape[-1]
    levels = grouped(torch.zeros(shape, dtype=torch.int32, device=words[0][0].device))
    byte = 8 * torch.arange(BYTES, dtype=torch.int32, device=levels.device)
    for own, parts in words:
        for part in parts:
            bits = own[..., None] >> (byte + part.bit) & part.mask
            levels[..., part.group, :, part.four, :] |= bits << part.place
    return levels.flatten(-4)
