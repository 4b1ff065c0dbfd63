"""StreamingLLM: sinks and the most recent rows, the budget spent on a longer window.

Source: Xiao et al., arXiv 2309.17453.
"""

from saap.selector import Selector

from .base import Method
from .dense import everything


class StreamingSelector(Selector):
    bounds = ("max_tokens",)

    def select(self, query, middle, budget, room):
        starts, lengths = everything(query, middle)
        kept = lengths.clamp(max=budget.max_tokens)
        return starts + lengths - kept, kept


class Streaming(Method):
    name = "streaming"
    needs_index = False
    bounds = ("max_tokens",)

    def selector(self, layer):
        return StreamingSelector()
