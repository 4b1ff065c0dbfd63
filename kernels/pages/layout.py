"""The layout of coded keys in a paged cache: 4 bits for each coordinate, a scale for each key.

A serving engine fixes where a token's key lies: in a page of some tokens that no other code may
reorder, that is used again later, and that sequences with the same beginning share. So a code has
no other place than its key's: page, KV head, row. It is written when the key is written.

Keys are coded after a random rotation, the same for all, which makes coordinates alike: with 4
bits each the best pages by codes hold 99 % of what the best pages by exact scores hold. Nothing is
learned, and RoPE may stay on: only products of queries with keys count.

Eight coordinates share an int32 word: coordinates `8 w + j` are the lower halves of the bytes `j`
of word `w`, coordinates `8 w + 4 + j` the upper ones. Words lie plane by plane within a page
(`[words, rows]`), so that a scan handles as many rows at once as a register holds.
"""

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int32
from torch import Tensor

PER_WORD = 8
"""Coordinates of a word."""

STEP = 0.335
"""Step of a uniform quantizer of 16 levels with the least error for normal variables."""

ZERO = 7.5
"""The code that would stand for 0."""

LARGEST = 15
QUERY_MAX = 127
"""Queries are rounded to whole numbers of a byte, with a scale for each head."""


@dataclass(frozen=True)
class PageCodes:
    """Coded keys of all pages: `words [pages, Hkv, D / 8, rows]` int32, `scales [pages, Hkv,
    rows]` float32, both contiguous."""

    words: Int32[Tensor, "pages Hkv words rows"]
    scales: Float[Tensor, "pages Hkv rows"]

    @classmethod
    def empty(
        cls, pages: int, kv_heads: int, rows: int, dim: int, device: torch.device | str = "cpu"
    ) -> "PageCodes":
        """Codes of keys that are all zero. Raises ValueError if `dim` is no multiple of 8."""
        if dim % PER_WORD or dim < PER_WORD:
            raise ValueError(f"dim must be a multiple of {PER_WORD}; got {dim}")
        shape = (pages, kv_heads, dim // PER_WORD, rows)
        words = torch.zeros(shape, dtype=torch.int32, device=device)
        return cls(words, torch.zeros(pages, kv_heads, rows, device=device, dtype=torch.float32))

    @functools.cached_property
    def fault(self) -> str | None:
        """What of shapes and dtypes does not fit together, or None."""
        if self.words.ndim != 4 or self.words.dtype != torch.int32:
            return (
                "codes.words must be int32 [pages, Hkv, D / 8, rows]; got "
                f"{self.words.dtype} {list(self.words.shape)}"
            )
        pages, kv_heads, _, rows = self.words.shape
        expected = (pages, kv_heads, rows)
        if tuple(self.scales.shape) != expected or self.scales.dtype != torch.float32:
            return (
                f"codes.scales must be float32 {list(expected)}; got {self.scales.dtype} "
                f"{list(self.scales.shape)}"
            )
        if not (self.words.is_contiguous() and self.scales.is_contiguous()):
            return "codes must be contiguous; got strides"
        return None

    @property
    def pages(self) -> int:
        return self.words.shape[0]

    @property
    def kv_heads(self) -> int:
        return self.words.shape[1]

    @property
    def dim(self) -> int:
        """D."""
        return PER_WORD * self.words.shape[2]

    @property
    def rows(self) -> int:
        """Rows of a page."""
        return self.words.shape[3]

    @property
    def bytes_per_key(self) -> int:
        return 4 * self.words.shape[2] + 4


@functools.cache
def rotation(dim: int) -> Float[Tensor, "D D"]:
    """A random orthogonal matrix, always the same: keys and queries are multiplied by it."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(normal)[0].float().contiguous()


def decode(codes: PageCodes) -> Float[Tensor, "pages Hkv rows D"]:
    """The rotated keys that the codes stand for."""
    words = codes.words.transpose(-1, -2).long() & (2**32 - 1)
    shifts = torch.tensor([8 * byte + 4 * half for half in range(2) for byte in range(4)])
    parts = (words[..., None] >> shifts.to(words.device)) & LARGEST
    return (parts.flatten(-2).float() - ZERO) * codes.scales[..., None]
