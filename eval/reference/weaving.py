"""Lines put into running text, with the weight that each of their bytes has in the loss."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from saap.eval.tasks.passkey import line_starts

PLAIN, UNKNOWABLE = 1.0, 0.0
FIRST_ANSWER_WEIGHT, ANSWER_WEIGHT = 20.0, 8.0
"""The first byte of an answer needs the place where it stood; the others can follow it."""


@dataclass(frozen=True)
class Line:
    """`text` goes to the line start nearest to `depth` (0 = beginning, 1 = end) of a text.

    `weights float32 [len(text)]`. Lines of one place stand in the order of `rank`.
    """

    depth: float
    rank: tuple[float, ...]
    text: bytes
    weights: np.ndarray


def line(depth: float, rank: tuple[float, ...], *parts: tuple[str | bytes, float]) -> Line:
    """A line of `parts`, each with one weight; ANSWER_WEIGHT gives its first byte more."""
    texts = [p.encode() if isinstance(p, str) else p for p, _ in parts]
    weights = [np.full(len(t), w, np.float32) for t, (_, w) in zip(texts, parts, strict=True)]
    for part, (_, weight) in zip(weights, parts, strict=True):
        if weight == ANSWER_WEIGHT:
            part[0] = FIRST_ANSWER_WEIGHT
    return Line(depth, rank, b"".join(texts), np.concatenate(weights))


def weave(text: bytes, lines: list[Line]) -> tuple[bytes, np.ndarray]:
    """`text` with all lines in it, and weights `float32 [len]`: those of the text are PLAIN."""
    starts = line_starts(text)
    nearest = [int(starts[np.abs(starts - own.depth * len(text)).argmin()]) for own in lines]
    order = sorted(range(len(lines)), key=lambda i: (nearest[i], lines[i].rank))
    pieces, weights, at = [], [], 0
    for number in order:
        offset = nearest[number]
        pieces += [text[at:offset], lines[number].text]
        weights += [np.full(offset - at, PLAIN, np.float32), lines[number].weights]
        at = offset
    pieces.append(text[at:])
    weights.append(np.full(len(text) - at, PLAIN, np.float32))
    return b"".join(pieces), np.concatenate(weights)
