"""RULER's aggregation over the whole context: the words that come most often.

Nothing is hidden at one place, so a method that finds needles alone has nothing to find.
"""

import numpy as np

from .prompts import Prompt, PromptTask

SYLLABLES = "ba be bi bo ca ce co da de di do fa fe fi ga go ka ki la le li lo ma me mi mo".split()
N_COMMON, COMMON_TIMES, RARE_TIMES = 10, 30, 3
N_FREQUENT, ZIPF = 3, 2.0


def draw_words(rng, count, syllables):
    codes = rng.choice(len(SYLLABLES) ** syllables, count, replace=False)
    return [
        "".join(SYLLABLES[code // len(SYLLABLES) ** i % len(SYLLABLES)] for i in range(syllables))
        for code in codes
    ]


class CommonWords(PromptTask):
    """Ten words stand ten times as often as all others in a numbered list."""

    name = "common-words"
    slack = 8

    def make(self, haystack, n_bytes, rng, depth, n_questions=1):
        ask = f"\nQuestion: which {N_COMMON} words are most common in the list? Answer: ".encode()
        words = draw_words(rng, N_COMMON + n_bytes // 4, 4)
        n_words = (n_bytes - len(ask)) // 16  # "1234. babebibo " takes 12 to 15 bytes
        # Short lists repeat the common words less often, in the same ratio to the others.
        times = min(COMMON_TIMES, max(2, n_words // (2 * N_COMMON)))
        rare_times = max(1, times * RARE_TIMES // COMMON_TIMES)
        common = words[:N_COMMON]
        n_rare = max(0, n_words - times * N_COMMON) // rare_times
        entries = np.array(common * times + words[N_COMMON : N_COMMON + n_rare] * rare_times)
        rng.shuffle(entries)
        text = " ".join(f"{i}. {word}" for i, word in enumerate(entries, 1))
        return [Prompt(text.encode()[: n_bytes - len(ask)], (ask,), (tuple(common),), None)]


class FrequentWords(PromptTask):
    """Coded words drawn with Zipf's law; the three most frequent are asked for."""

    name = "frequent-words"
    slack = 8

    def make(self, haystack, n_bytes, rng, depth, n_questions=1):
        ask = f"\nQuestion: which {N_FREQUENT} coded words are most frequent? Answer: ".encode()
        words = draw_words(rng, 200, 3)
        n_words = (n_bytes - len(ask)) // 7
        weights = 1 / np.arange(1, len(words) + 1) ** ZIPF
        drawn = rng.choice(words, n_words, p=weights / weights.sum())
        counts = {w: int((drawn == w).sum()) for w in words}
        best = sorted(words, key=lambda w: -counts[w])[:N_FREQUENT]
        return [Prompt(" ".join(drawn).encode(), (ask,), (tuple(best),), None)]
