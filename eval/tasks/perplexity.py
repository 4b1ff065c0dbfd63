"""Perplexity of the end of a held-out text whose long beginning was prefilled densely.

The last `n_scored` tokens go through the method one at a time; how much worse they are predicted
than with dense attention is judged by a paired bootstrap over texts. Where dense attention is
among the methods, so is how far the predicted distributions are from its (KL divergence): texts
are few, and a method that is wrong about the next token is sometimes lucky.
"""

import torch

from saap import hf

from ..decoding import divergence, each_point
from .base import Task, text_tokens


class Perplexity(Task):
    name = "perplexity"

    def n_units(self, config):
        return config.n_texts

    def context_rows(self, config, context):
        return context - config.n_scored

    @torch.no_grad()
    def run_unit(self, bench, context, number):
        config = bench.config
        tokens = text_tokens(bench.tokenizer, bench.text, context, number, config.n_texts)
        n_context = self.context_rows(config, context)
        read = hf.read_context(bench.model, tokens[:n_context])
        inputs, targets = tokens[n_context:-1], tokens[n_context + 1 :]
        dense = None

        def measure(variant, point, decoder) -> list[dict]:
            nonlocal dense
            logits = decoder.logits(inputs)
            if variant.method.is_exact:
                dense = logits
            losses = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
            record = {"nll": float(losses), "tokens": len(targets)}
            if dense is not None:
                record["divergence"] = len(targets) * divergence(dense, logits)
            return [{**record, **decoder.visited.as_record()}]

        points = bench.points(n_context, config.answer_budgets)
        records = each_point(bench.model, read, points, len(inputs), measure)
        return records, bytes(tokens.to(torch.int32).numpy())
