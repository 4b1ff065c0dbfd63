"""How far a method carries before the answer would be another: tokens per verification.

The tokens that the model says with dense attention after a text are known. The method drafts up to
`DRAFTS` tokens after those said so far; drafts count up to the first that is another token, where
dense attention's own takes its place, and drafting goes on behind it. That is lossless decoding
(`saap.attached(..., verify=8)`) with a fixed number of drafts, and costs no verification here.
"""

import torch

from saap import hf

from ..decoding import Decoder, each_point
from .base import Task, text_tokens

DRAFTS = 8


class Drafting(Task):
    name = "drafting"

    def n_units(self, config):
        return config.n_texts

    def context_rows(self, config, context):
        return context - config.n_scored

    def run_unit(self, bench, context, number):
        config = bench.config
        n_context = self.context_rows(config, context)
        tokens = text_tokens(bench.tokenizer, bench.text, n_context, number, config.n_texts)
        read = hf.read_context(bench.model, tokens[:-1])
        wanted: list[int] = []

        def measure(variant, point, decoder) -> list[dict]:
            if not wanted:
                decoder.cache.exact = True
                wanted.extend(decoder.greedy(tokens[-1:], config.n_scored))
                decoder.cache.exact = False
                decoder.restart(point.budget)
            verifications, accepted = drafted(decoder, int(tokens[-1]), wanted)
            record = {"verifications": verifications, "accepted": accepted}
            return [{**record, **decoder.visited.as_record()}]

        points = bench.points(n_context, config.answer_budgets)
        records = each_point(bench.model, read, points, config.n_scored + DRAFTS, measure)
        return records, bytes(tokens.to(torch.int32).numpy())


def drafted(decoder: Decoder, last: int, wanted: list[int]) -> tuple[int, int]:
    """How many verifications `wanted` takes after the token `last`, and the drafts accepted."""
    said, verifications, accepted = 0, 0, 0
    pending = [last, *wanted]
    while len(wanted) - said > 1:  # the last one alone needs no draft
        most = min(DRAFTS, len(wanted) - said - 1)
        with decoder.cache.drafting():
            drafts = decoder.greedy(pending[said : said + 1], most)
        same = 0
        while same < most and drafts[same] == wanted[said + same]:
            same += 1
        decoder.take(pending[said : said + same + 1])
        verifications, accepted, said = verifications + 1, accepted + same, said + same + 1
    return verifications, accepted
