"""Read a document into a cache, and generate text that streams."""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import TextStreamer

from .attach import SaapModel
from .cache import SaapCache
from .cache_argument import over


@torch.no_grad()
def read_document(
    saap_model: SaapModel,
    tokens: Tensor,
    *,
    chunk: int = 2048,
    spare: int = 1024,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SaapCache:
    """A cache of `tokens [N]`, read exactly and in chunks, with room for `spare` more."""
    cache = saap_model.cache(capacity=len(tokens) + spare)
    cache.exact = True  # the last chunk may be one token
    for start in range(0, len(tokens), chunk):
        part = tokens[None, start : start + chunk].to(saap_model.model.device)
        saap_model.model(part, **over(cache), logits_to_keep=1)
        progress(min(start + chunk, len(tokens)), len(tokens))
    cache.exact = False
    return cache


@dataclass(frozen=True)
class Generated:
    """`tokens` without the prompt; `seconds` of each but the first, which waits for the prompt."""

    tokens: list[int]
    text: str
    seconds: list[float]

    @property
    def tokens_per_second(self) -> float:
        return len(self.seconds) / sum(self.seconds) if self.seconds else float("nan")


class _Timed(TextStreamer):
    def __init__(self, tokenizer, write: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write, self.text, self.times = write, "", []

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        self.write(text)


def generate_text(
    model,
    tokenizer,
    tokens: Tensor,
    n_tokens: int,
    *,
    cache: SaapCache | None = None,
    write: Callable[[str], None] = lambda text: None,
) -> Generated:
    """Continue `tokens [N]` greedily by at most `n_tokens`; `write` gets the text as it comes.

    `cache` may hold some of the first tokens already.
    """
    streamer = _Timed(tokenizer, write)
    given = tokens[None].to(model.device)
    found = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        **over(cache),
        max_new_tokens=n_tokens,
        do_sample=False,
        streamer=streamer,
    )
    times = streamer.times
    seconds = [b - a for a, b in itertools.pairwise(times)]
    return Generated(found[0, len(tokens) :].tolist(), streamer.text, seconds)
