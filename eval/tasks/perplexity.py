"""Perplexity of the end of a held-out text whose long beginning was prefilled densely.

The last `n_scored` tokens go through the method one at a time; how much worse they are predicted
than with dense attention is judged by a paired bootstrap over texts.
"""

import torch

from saap import hf
from saap.prefill import DensePrefill

from .answering import decoders
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
        prefill = DensePrefill(n_context)
        hf.run_chunks(bench.model, tokens[None, :n_context], prefill)
        inputs, targets = tokens[n_context:-1], tokens[n_context + 1 :]
        records = []
        for arm, points in bench.points(n_context, config.answer_budgets):
            for point, decode in decoders(prefill, arm, points, len(inputs)):
                logits = all_logits(bench.model, inputs, decode, n_context)
                losses = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
                visited = decode.visited
                records.append(
                    {
                        "method": arm.label,
                        "budget": point.label,
                        "nll": float(losses),
                        "tokens": len(targets),
                        "selectivity": visited.selectivity,
                        "bytes_read": visited.nbytes / visited.steps,
                        "router_bytes": sum(d.selector.nbytes for d in decode.layers.values())
                        / len(decode.layers),
                    }
                )
        return records, bytes(tokens.to(torch.int32).numpy())


def all_logits(model, tokens, handler, start):
    """Logits `[T, vocab]`, float32, of `tokens [T]` at positions from `start`."""
    positions = torch.arange(start, start + len(tokens))
    with hf.routed(model, handler):
        found = model(tokens[None], position_ids=positions[None], use_cache=False)
    return found.logits[0].float()
