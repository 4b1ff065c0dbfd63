"""Named pass keys hidden in real text.

The last line of a prompt states the beginning of one of those sentences again; the answer is
right when all digits follow. Every other key in the text is a distractor, so finding *a* key does
not help: the name has to be matched.
"""

from dataclasses import dataclass

import numpy as np

from .asking import ask
from .base import Prompt, Task

# No two names end in the same two letters: a byte-level model of a few million parameters can tell
# them apart, and still has to match the name.
NAMES = """
acorn agate alder anvil apple arrow aspen banjo beacon birch brick bronze cactus camel cedar
cello cherry cobalt comet coral crane dahlia daisy delta denim ebony flint forest indigo iris
island jade kelp lilac moss nutmeg oak ocean olive onyx orchid pearl plum quartz quill reed
robin ruby sage spruce summit topaz tulip tundra valley walnut zinc
""".split()
KEY_DIGITS = 7


@dataclass(frozen=True)
class Wording:
    """How a pass key is stated and asked for.

    `answer_tokens`: room for an answer's digits. `lead_tokens`: room for words before them; 0
    where the digits follow the question at once.
    """

    sentence: str
    asked: str
    digits: int
    answer_tokens: int
    lead_tokens: int = 0

    def statement(self, name: str, key: str) -> str:
        return self.sentence.format(name=name, key=key)

    def question(self, name: str) -> str:
        return self.asked.format(name=name)

    def random_key(self, rng: np.random.Generator) -> str:
        return "".join(str(d) for d in rng.integers(0, 10, self.digits))


IN_CODE = Wording(
    "# The pass key {name}{key}\n", "# The pass key {name}", KEY_DIGITS, KEY_DIGITS + 1
)
"""For the reference model, which reads bytes of source text."""

IN_WORDS = Wording(
    "The pass key {name}-{key} is to be remembered.\n", "The pass key {name}-", 6, 8
)
"""For models of language. The name stands before its key, which even small models match."""

IN_CHAT = Wording(
    "The pass key of {name} is {key}. Remember it.\n",
    "What is the pass key of {name}? Answer with the number.",
    6, 8, lead_tokens=12,
)  # fmt: skip
"""For models that were taught to answer in turns of a conversation."""

BYTES_VOCABULARY = 512


def wording_of(tokenizer, chat: bool = False) -> Wording:
    """What a model with this tokenizer can be asked: one of bytes knows the code's form alone."""
    if len(tokenizer) <= BYTES_VOCABULARY:
        return IN_CODE
    return IN_CHAT if chat else IN_WORDS


def statement(name: str, key: str) -> str:
    return IN_CODE.statement(name, key)


def question(name: str) -> str:
    return IN_CODE.question(name)


def random_key(rng: np.random.Generator) -> str:
    return IN_CODE.random_key(rng)


def line_starts(text: bytes) -> np.ndarray:
    """Offsets in `text` at which a line starts, 0 and the end included."""
    breaks = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n")) + 1
    return np.unique(np.concatenate([[0], breaks, [len(text)]]))


def insert_lines(text: bytes, inserts: list[tuple[float, bytes]]) -> bytes:
    """Put each line at the line start nearest to its depth (0 = beginning, 1 = end) of `text`."""
    starts = line_starts(text)
    placed = sorted(
        (int(starts[np.abs(starts - depth * len(text)).argmin()]), order, line)
        for order, (depth, line) in enumerate(inserts)
    )
    pieces, at = [], 0
    for offset, _, line in placed:
        pieces += [text[at:offset], line]
        at = offset
    return b"".join([*pieces, text[at:]])


def make_prompt(haystack: bytes, length: int, rng: np.random.Generator, **options) -> Prompt:
    """The first of `make_prompts`."""
    return make_prompts(haystack, length, rng, **options)[0]


def make_prompts(
    haystack: bytes,
    length: int,
    rng: np.random.Generator,
    *,
    n_distractors: int = 8,
    n_questions: int = 1,
    depth: float | None = None,
    wording: Wording = IN_CODE,
) -> list[Prompt]:
    """Prompts of about `length` bytes (never more) whose one context is cut from `haystack`.

    Each asks another of the keys; the first one's stands at `depth` (0 = beginning), which is
    drawn at random when None. Raises ValueError when `haystack` is too short or there are more
    distractors than names.
    """
    if not 0 <= n_distractors < len(NAMES):
        raise ValueError(f"n_distractors must be in 0..{len(NAMES) - 1}; got {n_distractors}")
    names = [NAMES[i] for i in rng.permutation(len(NAMES))[: n_distractors + 1]]
    keys = [wording.random_key(rng) for _ in names]
    depth = float(rng.uniform(0.0, 0.95)) if depth is None else depth
    depths = [depth, *rng.uniform(0.0, 0.95, n_distractors)]
    lines = [wording.statement(n, k).encode() for n, k in zip(names, keys, strict=True)]
    asked = [wording.question(n).encode() for n in names[:n_questions]]
    room = length - sum(map(len, lines)) - max(map(len, asked)) - 1 - wording.digits
    if room <= 0 or len(haystack) < room:
        raise ValueError(
            f"length={length} with {n_distractors} distractors must leave 1 to {len(haystack)} "
            f"bytes of haystack; got {room}"
        )
    start = int(rng.integers(0, len(haystack) - room + 1))
    text = haystack[start : start + room]
    context = insert_lines(text, list(zip(depths, lines, strict=True)))
    if not context.endswith(b"\n"):
        context += b"\n"
    return [
        Prompt(context, (question,), ((key,),), at)
        for question, key, at in zip(asked, keys, depths, strict=False)
    ]


def is_right(prompt: Prompt, generated: bytes) -> bool:
    """All digits right, as the first thing after the question."""
    return generated.lstrip().startswith(prompt.answer.encode())


class PassKey(Task):
    """One of nine named pass keys."""

    name = "passkey"

    def n_units(self, config):
        return config.n_prompts

    def run_unit(self, bench, context, number):
        config, wording = bench.config, wording_of(bench.tokenizer, bench.config.chat)
        # Depths are spread evenly over the prompts, so that every run covers beginning to end.
        depth = (number + 0.5) / config.n_prompts * 0.95

        def make(n_bytes: int) -> list[Prompt]:
            rng = bench.rng(context, number)
            return make_prompts(
                bench.text,
                n_bytes,
                rng,
                n_distractors=config.n_distractors,
                n_questions=config.n_questions,
                depth=depth,
                wording=wording,
            )

        def score(prompt: Prompt, answers: list[bytes]) -> bool:
            if wording.lead_tokens:
                return prompt.answer.encode() in answers[0]
            return is_right(prompt, answers[0])

        n_tokens = wording.answer_tokens + wording.lead_tokens
        room = context - max(wording.digits + 8, n_tokens)
        return ask(bench, make, room, score, n_tokens)
