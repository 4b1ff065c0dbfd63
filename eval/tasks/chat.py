"""Questions in a model's chat template: the context and the first question are one user's turn."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from .answering import encode
from .base import Prompt

MARKS = ("\x00context\x00", "\x00answer\x00", "\x00question\x00")


@dataclass(frozen=True)
class ChatTemplate:
    """What a chat template puts around the texts of its turns.

    `opening` stands before the context, `to_answer` between a question and its answer, `to_ask`
    between an answer and the next question.
    """

    opening: str
    to_answer: str
    to_ask: str

    @classmethod
    def of(cls, tokenizer) -> "ChatTemplate":
        """ValueError where there is no template, or one that cannot be taken apart."""
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("chat needs a model with a chat template; got one without")
        roles = ("user", "assistant", "user")
        turns = [{"role": r, "content": m} for r, m in zip(roles, MARKS, strict=True)]
        rest = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        parts = []
        for mark in MARKS:
            before, found, rest = rest.partition(mark)
            if not found:
                raise ValueError("chat needs a template that keeps every turn's text; got another")
            parts.append(before)
        opening, to_answer, to_ask = parts
        if tokenizer("a")["input_ids"] != tokenizer("a", add_special_tokens=False)["input_ids"]:
            opening = opening.removeprefix(tokenizer.bos_token or "")  # the tokenizer adds it
        return cls(opening, to_answer, to_ask)

    def end_of_turn(self, tokenizer) -> int:
        """The token that ends an answer."""
        return int(encode(tokenizer, self.to_ask.encode(), special=False)[0])

    def around_all(self, make: Callable[[int], list[Prompt]]) -> Callable[[int], list[Prompt]]:
        """`make`, whose prompts become turns of a conversation."""
        return lambda n_bytes: [self.around(prompt) for prompt in make(n_bytes)]

    def around(self, prompt: Prompt) -> Prompt:
        asks = [f"{self.to_ask}".encode() * (i > 0) + q for i, q in enumerate(prompt.questions)]
        return dataclasses.replace(
            prompt,
            context=self.opening.encode() + prompt.context,
            questions=tuple(ask + self.to_answer.encode() for ask in asks),
        )
