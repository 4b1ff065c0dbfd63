"""Recall of a random string that stood once in the context, from its beginning.

A string of random letters cannot be guessed: every letter has to be read where it stands.
"""

from .prompts import Prompt, PromptTask, hide

N_GIVEN, N_ASKED = 16, 24
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Copying(PromptTask):
    """The next 24 letters of a line of 40 after its first 16; the share right before an error."""

    name = "copying"
    slack = 0

    def make(self, haystack, n_bytes, rng, depth, n_questions=1):
        line = "".join(LETTERS[i] for i in rng.integers(0, 26, N_GIVEN + N_ASKED))
        ask = f"# {line[:N_GIVEN]}".encode()
        hidden = [(depth, f"# {line}\n".encode())]
        context = hide(haystack, hidden, n_bytes - len(ask), rng)
        return [Prompt(context, (ask,), ((line[N_GIVEN:],),), depth)]

    def score(self, prompt, generated):
        wanted, given = prompt.answers[0][0].encode(), generated[0]
        right = 0
        while right < min(len(wanted), len(given)) and wanted[right] == given[right]:
            right += 1
        return right / len(wanted)
