"""Chooses how many tokens to draft, from how many were accepted and what they cost."""

from collections import deque
from dataclasses import dataclass, field

from saap.budget import is_integer

MOST_LOSS = 0.03  # of the time spent, on finding out whether drafts pay
FIRST_EXACT = 2  # exact steps before the first drafts: the measure of all others
FIRST_DRAFTS = (4, 2)
EXACT_EVERY = 64  # rounds; a longer cache makes the exact step slower
FORGET = 0.95
EXPECTED, WEIGHT = 0.8, 2.0  # share of drafts accepted, before any was seen


@dataclass(frozen=True)
class Verify:
    """Lossless decoding: at most `drafts` tokens are drafted before each verification.

    `adapt`: draft fewer, or none, if that is faster; if False, always draft `drafts`.
    """

    drafts: int = 8
    adapt: bool = True

    def __post_init__(self):
        if not is_integer(self.drafts, 1):
            raise ValueError(f"verify must be an integer of at least 1; got {self.drafts!r}")


@dataclass
class Tally:
    """What lossless decoding over a cache has done so far."""

    verifications: int = 0
    drafted: int = 0
    accepted: int = 0
    exact_steps: int = 0

    @property
    def accepted_per_verification(self) -> float:
        """Tokens that one verification gives, including the one that it adds itself."""
        return 1 + self.accepted / self.verifications if self.verifications else 1.0

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that were accepted."""
        return self.accepted / self.drafted if self.drafted else 0.0


@dataclass
class Recent:
    """The latest few durations of one thing, in seconds."""

    seconds: deque = field(default_factory=lambda: deque(maxlen=7))

    def add(self, seconds: float) -> None:
        self.seconds.append(seconds)

    @property
    def usual(self) -> float:
        """The median, the lower one of two: a first call may compile something."""
        return sorted(self.seconds)[(len(self.seconds) - 1) // 2]


class Pace:
    """Chooses the number of drafts for a cache, and counts how many were accepted.

    If a share `a` of drafts is accepted, `n` drafts give `1 + a + ... + a^n` tokens and cost n
    draft steps and the verification of n + 1 tokens. The best n gives the most tokens a second;
    n = 0 is an exact step of one token. If that is best, drafts are still tried now and then, for
    at most `MOST_LOSS` of the time. The same bound holds for all drafts that turn out slower than
    exact steps.
    """

    def __init__(self, verify: Verify):
        self.verify = verify
        self.tally = Tally()
        self.draft_steps = Recent()
        self.verifications: dict[int, Recent] = {}  # by number of tokens; 1: an exact step
        self.tested, self.kept = WEIGHT, WEIGHT * EXPECTED
        self.spent, self.won = 0.0, 0.0  # seconds; `won` against exact steps
        self.rounds = 0

    def choose(self, most: int) -> int:
        """How many tokens to draft now, at most `most`."""
        most = min(most, self.verify.drafts)
        if not self.verify.adapt or most < 1:
            return max(0, most)
        if self.rounds < FIRST_EXACT or self.rounds % EXACT_EVERY == 0:
            return 0
        if self.rounds < FIRST_EXACT + len(FIRST_DRAFTS):
            return min(most, FIRST_DRAFTS[self.rounds - FIRST_EXACT])
        if not self.draft_steps.seconds:
            return min(most, FIRST_DRAFTS[0])
        exact = self.verifications[1].usual
        best = max(range(1, most + 1), key=lambda n: self.tokens(n) / self.seconds(n))
        loss = self.seconds(best) - self.tokens(best) * exact
        affordable = self.won + MOST_LOSS * self.spent
        return best if affordable >= max(0.0, loss) else 0

    def tokens(self, n: int) -> float:
        """Tokens to expect of `n` drafts and their verification."""
        share = self.kept / self.tested
        return sum(share**i for i in range(n + 1))

    def seconds(self, n: int) -> float:
        """Seconds to expect of `n` drafts and their verification."""
        return n * self.draft_steps.usual + self._verification(n + 1)

    def took(self, draft_steps: list[float], verification: float, tested: int, kept: int) -> None:
        """Note one round: seconds of its draft steps and of its verification, and how many drafts
        were compared and accepted."""
        n = len(draft_steps)
        for seconds in draft_steps:
            self.draft_steps.add(seconds)
        self.verifications.setdefault(n + 1, Recent()).add(verification)
        self.tested = FORGET * self.tested + tested
        self.kept = FORGET * self.kept + kept
        seconds = sum(draft_steps) + verification
        if self.verify.adapt and self.rounds >= FIRST_EXACT + len(FIRST_DRAFTS):
            self.spent += seconds
            if n:
                self.won += (kept + 1) * self.verifications[1].usual - seconds
        self.rounds += 1
        tally = self.tally
        tally.exact_steps += n == 0
        tally.verifications += n > 0
        tally.drafted += n
        tally.accepted += kept

    def _verification(self, n_tokens: int) -> float:
        """Seconds for that many tokens; on a straight line between the numbers that were timed."""
        known = sorted(self.verifications)
        if n_tokens in self.verifications or len(known) == 1:
            return self.verifications[n_tokens if n_tokens in known else known[0]].usual
        above = next((i for i, n in enumerate(known) if n > n_tokens), len(known) - 1)
        low, high = known[max(0, above - 1)], known[max(1, above)]
        first, last = self.verifications[low].usual, self.verifications[high].usual
        slope = max(0.0, (last - first) / (high - low))
        return first + slope * (n_tokens - low)
