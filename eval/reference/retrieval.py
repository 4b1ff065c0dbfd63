"""What a model learns to look up: each task is a few lines that state something and later ask it.

A maker draws the lines of one item. Formats are those that the tasks of `saap.eval.tasks` ask in.
Everything that is asked has been stated before, and nothing else has more than plain weight.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np

from saap.eval.tasks import copying, passkey, tracking

from .weaving import ANSWER_WEIGHT, PLAIN, UNKNOWABLE, Line, line

Chunk = Callable[[np.random.Generator, int], bytes]
SYLLABLES = [c + v for c in "bcdfghjklmnprstvwz" for v in "aeiou"]
ASKED_SHARE = 0.75  # the others are distractors: stated, never asked
STATED, ASKED = 0.0, 1.0  # ranks: where both come to one place, the statement stands first


class Draw:
    """One sequence's random choices; names and variables come once only.

    `length` bytes; with `at_end` all questions stand after the text, else anywhere behind their
    statements.
    """

    def __init__(self, rng: np.random.Generator, length: int, chunk: Chunk):
        self.rng, self.length, self.chunk = rng, length, chunk
        self.at_end = rng.random() < 0.5
        self.names = self._names()
        self.variables: set[str] = set()

    def _names(self) -> Iterator[str]:
        """Those of the task and made-up ones in turn, so that any name can be looked up."""
        taken = set(passkey.NAMES)
        known = [passkey.NAMES[i] for i in self.rng.permutation(len(passkey.NAMES))]
        while True:
            if known and self.rng.random() < 0.5:
                yield known.pop()
                continue
            picked = self.rng.integers(0, len(SYLLABLES), int(self.rng.integers(2, 5)))
            name = "".join(SYLLABLES[i] for i in picked)
            if name not in taken:
                taken.add(name)
                yield name

    def variable(self) -> str:
        while True:
            name = "".join(tracking.LETTERS[i] for i in self.rng.integers(0, 26, 5))
            if name not in self.variables:
                self.variables.add(name)
                return name

    def depths(self, count: int) -> tuple[list[float], float]:
        """Ascending places of `count` statements, and one of a question behind them."""
        stated = np.sort(self.rng.uniform(0.0, 1.0, count))
        asked = 1.0 if self.at_end else float(self.rng.uniform(stated[-1], 1.0))
        return stated.tolist(), asked

    def rank(self, kind: float, number: int = 0) -> tuple[float, ...]:
        """Questions in random order; statements of one item in theirs."""
        return (kind, number) if kind == STATED else (kind, float(self.rng.random()))


def named_key(draw: Draw) -> list[Line]:
    """A pass key by its name, among as many others as there are in the sequence."""
    name, key = next(draw.names), passkey.random_key(draw.rng)
    lead = passkey.question("")
    (depth,), later = draw.depths(1)
    stated = line(depth, draw.rank(STATED), (lead, PLAIN), (name + key, UNKNOWABLE), ("\n", PLAIN))
    if draw.rng.random() > ASKED_SHARE:
        return [stated]
    parts = (lead, PLAIN), (name, UNKNOWABLE), (key, ANSWER_WEIGHT), ("\n", PLAIN)
    return [stated, line(later, draw.rank(ASKED), *parts)]


def many_values(draw: Draw) -> list[Line]:
    """All pass keys of one name, in the order in which they stood."""
    name, lead = next(draw.names), passkey.question("")
    keys = [passkey.random_key(draw.rng) for _ in range(int(draw.rng.integers(2, 5)))]
    depths, later = draw.depths(len(keys))
    lines = [
        line(d, draw.rank(STATED, i), (lead, PLAIN), (name + key, UNKNOWABLE), ("\n", PLAIN))
        for i, (d, key) in enumerate(zip(depths, keys, strict=True))
    ]
    ask = f"# All {len(keys)} pass keys of ", " above: "
    parts = [(ask[0], PLAIN), (name, UNKNOWABLE), (ask[1], PLAIN), *listed(keys)]
    return [*lines, line(later, draw.rank(ASKED), *parts)]


def chain(draw: Draw) -> list[Line]:
    """Variables assigned to each other; the question asks for all that hold the first's value."""
    names = [draw.variable() for _ in range(int(draw.rng.integers(2, tracking.N_HOPS + 3)))]
    value = str(draw.rng.integers(10_000, 100_000))
    depths, later = draw.depths(len(names))
    first = ("VAR ", PLAIN), (names[0], UNKNOWABLE), (" = ", PLAIN), (value, UNKNOWABLE)
    lines = [line(depths[0], draw.rank(STATED, 0), *first, ("\n", PLAIN))]
    for number in range(1, len(names)):
        # Which variable is assigned cannot be told before its first letter.
        source = names[number - 1]
        parts = ("VAR ", PLAIN), (names[number], UNKNOWABLE), (" = ", PLAIN)
        known = (source[:1], UNKNOWABLE), (source[1:], PLAIN), ("\n", PLAIN)
        lines.append(line(depths[number], draw.rank(STATED, number), *parts, *known))
    if draw.rng.random() > ASKED_SHARE:
        return lines
    parts = [
        ("# Question: which variables above are assigned the value ", PLAIN),
        (value, UNKNOWABLE),
        (
            ", directly or through others? Answer: the " + f"{len(names)} variables are ",
            PLAIN,
        ),
        *listed(names),
    ]
    return [*lines, line(later, draw.rank(ASKED), *parts)]


def listed(answers: list[str]) -> list[tuple[str, float]]:
    """`a, b, c` and a line end, answers weighted."""
    parts: list[tuple[str, float]] = []
    for number, answer in enumerate(answers):
        parts += [(", ", PLAIN)] if number else []
        parts.append((answer, ANSWER_WEIGHT))
    return [*parts, ("\n", PLAIN)]


def random_string(draw: Draw) -> list[Line]:
    """Random letters, continued from their beginning."""
    picked = draw.rng.integers(0, 26, copying.N_GIVEN + copying.N_ASKED)
    letters = "".join(copying.LETTERS[i] for i in picked)
    given, rest = letters[: copying.N_GIVEN], letters[copying.N_GIVEN :]
    (depth,), later = draw.depths(1)
    stated = line(depth, draw.rank(STATED), ("# ", PLAIN), (letters, UNKNOWABLE), ("\n", PLAIN))
    parts = ("# ", PLAIN), (given, UNKNOWABLE), (rest, ANSWER_WEIGHT), ("\n", PLAIN)
    return [stated, line(later, draw.rank(ASKED), *parts)]


def long_copy(draw: Draw) -> list[Line]:
    """A block of text that comes a second time: up to an eighth of the sequence, 4,096 bytes."""
    longest = max(64, min(4096, draw.length // 8))
    size = int(math.exp(draw.rng.uniform(math.log(64), math.log(longest))))
    block = draw.chunk(draw.rng, size)
    (depth,), later = draw.depths(1)
    return [
        line(depth, draw.rank(STATED), (block, PLAIN), ("\n", PLAIN)),
        line(later, draw.rank(ASKED), (block[:32], PLAIN), (block[32:], 1.5), ("\n", PLAIN)),
    ]


def next_line(draw: Draw) -> list[Line]:
    """Two lines of text; later the first is quoted and the second has to follow."""
    for _ in range(8):
        lines = draw.chunk(draw.rng, 400).split(b"\n")[1:-1]
        pairs = [
            (first.strip(), second.strip())
            for first, second in itertools.pairwise(lines)
            if len(first.strip()) >= 16 and 8 <= len(second.strip()) <= 80
        ]
        if pairs:
            break
    else:
        return random_string(draw)
    first, second = pairs[int(draw.rng.integers(len(pairs)))]
    (depth,), later = draw.depths(1)
    return [
        line(depth, draw.rank(STATED), (first + b"\n" + second + b"\n", PLAIN)),
        line(
            later,
            draw.rank(ASKED),
            (b"# After the line: " + first + b"\n# follows: ", PLAIN),
            (second, ANSWER_WEIGHT),
            ("\n", PLAIN),
        ),
    ]


ITEMS: dict[str, Callable[[Draw], list[Line]]] = {
    "named": named_key,
    "values": many_values,
    "chains": chain,
    "strings": random_string,
    "long_copies": long_copy,
    "next_lines": next_line,
}
"""By the name of their share in `saap.eval.reference.sequences.Mix`."""


def draw_lines(draw: Draw, kinds: tuple[str, ...]) -> list[Line]:
    """Items of `kinds` that fill 3 to 50 % of the sequence; none where not one fits.

    An item is taken whole or not at all, so that no question is left without its statement. Kinds
    get equal shares of the bytes.
    """
    share = math.exp(draw.rng.uniform(math.log(0.03), math.log(0.5)))
    room = int(share * draw.length)
    lines: list[Line] = []
    order = [kinds[i] for i in draw.rng.permutation(len(kinds))]
    bytes_of = dict.fromkeys(order, 0)
    refused = 0
    while refused < 4:
        kind = min(order, key=lambda k: bytes_of[k])
        item = ITEMS[kind](draw)
        size = sum(len(own.text) for own in item)
        bytes_of[kind] += size
        if size > (room if lines else draw.length * 3 // 4):
            refused += 1
            continue
        lines += item
        room -= size
    return lines
