"""Training sequences: real source text mixed with tasks that can only be solved by looking back.

A sequence is `(tokens, weights)`: weights are 0 where nothing could be predicted (the digits of a
key that is stated for the first time) and above 1 on answers.
"""

from dataclasses import astuple, dataclass

import numpy as np

from saap.eval.tasks import passkey

from . import retrieval
from .weaving import ANSWER_WEIGHT, FIRST_ANSWER_WEIGHT, Line, weave

BOS = 256


@dataclass(frozen=True)
class Mix:
    """Shares of a batch, which sum to 1.

    Plain text; pass keys; copied lines; short periods; then sequences of one kind of item of
    `retrieval.ITEMS`, and medleys of all of them.
    """

    text: float = 0.0
    keys: float = 0.0
    copies: float = 0.0
    periods: float = 0.0
    named: float = 0.0
    values: float = 0.0
    chains: float = 0.0
    strings: float = 0.0
    long_copies: float = 0.0
    next_lines: float = 0.0
    medley: float = 0.0

    def __post_init__(self):
        if abs(sum(astuple(self)) - 1) > 1e-9 or min(astuple(self)) < 0:
            raise ValueError(f"shares must be in 0..1 and sum to 1; got {self}")

    def shares(self) -> dict[str, float]:
        """The shares that are not 0, by name."""
        return {n: s for n, s in vars(self).items() if s}


class SequenceMaker:
    """Draws sequences of a given length from a corpus of bytes."""

    def __init__(self, corpus: np.ndarray):
        self.corpus = corpus

    def chunk(self, rng: np.random.Generator, length: int) -> bytes:
        start = int(rng.integers(0, len(self.corpus) - length))
        return self.corpus[start : start + length].tobytes()

    def batch(self, rng, batch: int, length: int, mix: Mix):
        """`tokens int64 [batch, length + 1]`, first column BOS, and `weights float32` alike."""
        tokens = np.full((batch, length + 1), BOS, np.int64)
        weights = np.ones((batch, length + 1), np.float32)
        shares = mix.shares()
        names = list(shares)
        for row, choice in enumerate(rng.choice(len(names), batch, p=list(shares.values()))):
            body, body_weights = self.make(names[choice], rng, length)
            tokens[row, 1:] = np.frombuffer(body, np.uint8)[:length]
            weights[row, 1:] = body_weights[:length]
        return tokens, weights

    def make(self, kind: str, rng: np.random.Generator, length: int):
        """`(bytes, weights float32)` of at least `length`, for a share's name in `Mix`."""
        own = {
            "text": self.text, "keys": self.pass_keys, "copies": self.copies,
            "periods": self.periods,
        }  # fmt: skip
        if kind in own:
            return own[kind](rng, length)
        return self.woven(rng, length, tuple(retrieval.ITEMS) if kind == "medley" else (kind,))

    def woven(self, rng, length, kinds):
        """Items of `kinds` stated and asked in text; exactly `length` bytes."""
        lines = retrieval.draw_lines(retrieval.Draw(rng, length, self.chunk), kinds)
        room = length - sum(len(own.text) for own in lines)
        # What is asked at the end starts a line of its own.
        return weave(self.chunk(rng, room - 1) + b"\n", lines)

    def text(self, rng, length):
        return self.chunk(rng, length), np.ones(length, np.float32)

    def periods(self, rng, length):
        """A random string over few symbols, repeated: the fewer the symbols, the longer the
        context that tells where in the period one is."""
        period = int(rng.integers(12, max(16, min(160, length // 3))))
        symbols = rng.permutation(np.arange(33, 127))[: int(rng.integers(2, 13))]
        unit = rng.choice(symbols, period).astype(np.uint8)
        body = np.resize(unit, length)
        return body.tobytes(), np.where(np.arange(length) < period, 0.0, 1.0).astype(np.float32)

    def copies(self, rng, length):
        """Lines that stood before are repeated: a third of the sequence or less."""
        pieces, weights, budget = [], [], length // 3
        inserts = []
        text = self.chunk(rng, length)
        starts = passkey.line_starts(text)
        while budget > 40 and len(inserts) < 12:
            size = int(min(budget, rng.integers(40, 320)))
            target = int(rng.choice(starts))
            earlier = starts[starts + size < target]
            if len(earlier) == 0:
                budget -= size
                continue
            source = int(rng.choice(earlier))
            inserts.append((target, text[source : source + size]))
            budget -= size
        at = 0
        for target, span in sorted(inserts):
            pieces += [text[at:target], span, b"\n"]
            weights += [np.ones(target - at), np.full(len(span), 1.5), np.ones(1)]
            at = target
        pieces.append(text[at:])
        weights.append(np.ones(len(text) - at))
        return b"".join(pieces), np.concatenate(weights).astype(np.float32)

    def pass_keys(self, rng, length):
        """Keys early, questions later: half the time all of them at the end, else spread out."""
        most = max(2, min(48, length // 70))
        crowded = rng.random() < 0.5
        n_keys = most if crowded else int(rng.integers(max(2, most // 4), most + 1))
        names = [passkey.NAMES[i] for i in rng.permutation(len(passkey.NAMES))[:n_keys]]
        keys = [passkey.random_key(rng) for _ in names]
        line = len(passkey.statement("falcon", "0" * 7))
        text = self.chunk(rng, max(1, length - 2 * n_keys * line))
        at_end = rng.random() < 0.5
        placed = []
        for name, key in zip(names, keys, strict=True):
            first = rng.uniform(0.0, 1.0)
            again = 1.0 if at_end else rng.uniform(first, 1.0)
            sentence = passkey.statement(name, key).encode()
            lead = len(passkey.question(name))
            hidden = np.ones(len(sentence), np.float32)
            hidden[lead - len(name) : lead] = 0.0
            asked = hidden.copy()
            hidden[lead : lead + passkey.KEY_DIGITS] = 0.0
            asked[lead : lead + passkey.KEY_DIGITS] = ANSWER_WEIGHT
            asked[lead] = FIRST_ANSWER_WEIGHT
            placed.append(Line(first, (0, rng.random()), sentence, hidden))
            placed.append(Line(again, (1, rng.random()), sentence, asked))
        body, body_weights = weave(text, placed)
        # Keep the end, where the questions are; pad at the front with more of the same text.
        short = length - len(body)
        if short > 0:
            body = self.chunk(rng, short) + body
            body_weights = np.concatenate([np.ones(short, np.float32), body_weights])
        return body[-length:], body_weights[-length:]
