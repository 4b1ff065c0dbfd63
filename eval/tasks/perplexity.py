"""Perplexity of the end of a held-out text whose long beginning was prefilled densely.

The last `n_scored` tokens go through the method one at a time; how much worse they are predicted
than with dense attention is judged by a paired bootstrap over texts.
"""

import torch

from saap import hf

from ..decoding import decoders
from .base import Task, text_tokens


class Perplexity(Task):
    name = "perplexity"

    def n_units(self, config):
        return config.n_texts

    @torch.no_grad()
    def run_unit(self, bench, context, number):
        config = bench.config
        tokens = text_tokens(bench.tokenizer, bench.text, context, number, config.n_texts)
        n_context = context - config.n_scored
        read = hf.read_context(bench.model, tokens[:n_context])
        inputs, targets = tokens[n_context:-1], tokens[n_context + 1 :]
        records = []
        for variant, points in bench.points(n_context, config.answer_budgets):
            for point, decoder in decoders(bench.model, read, variant, points, len(inputs)):
                losses = torch.nn.functional.cross_entropy(
                    decoder.logits(inputs), targets, reduction="sum"
                )
                records.append(
                    {
                        "method": variant.label,
                        "budget": point.label,
                        "nll": float(losses),
                        "tokens": len(targets),
                        **decoder.visited.as_record(),
                    }
                )
        return records, bytes(tokens.to(torch.int32).numpy())
