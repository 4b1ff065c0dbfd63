"""StreamingLLM: sinks and the most recent rows, the budget spent on a longer window.

Source: Xiao et al., arXiv 2309.17453.
"""

import torch

from .base import Method, Selector


class StreamingSelector(Selector):
    def __init__(self, n_kv: int, n_middle: int):
        self.n_kv, self.n_middle = n_kv, n_middle

    def select(self, q_rope, q_derope, budget):
        if budget.max_tokens is None:
            raise ValueError(
                "max_tokens=None: method 'streaming' has no buckets and needs a number"
            )
        rows = min(budget.max_tokens, self.n_middle)
        shape = (q_rope.shape[0], self.n_kv, 1)
        lengths = torch.full(shape, rows, dtype=torch.int32, device=q_rope.device)
        return self.n_middle - lengths, lengths


class Streaming(Method):
    name = "streaming"
    needs_index = False

    def build(self, keys):
        return StreamingSelector(*keys.k_rope.shape[1:3])
