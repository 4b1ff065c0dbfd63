"""Pages of consecutive rows, in time order, as the buckets of a partition."""

from abc import abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saap.index.lists import InvertedLists

from .snapshot import BucketChooser, LayerKeys
from .tokens import combine_heads

PAGE_SIZE = 16


def page_lists(n_rows: int, n_kv: int, page_size: int, device: torch.device) -> InvertedLists:
    """Pages as buckets: `order` is time order."""
    bounds = torch.arange(0, n_rows + page_size, page_size, device=device).clamp(max=n_rows)
    order = torch.arange(n_rows, device=device)
    return InvertedLists(
        order.expand(1, n_kv, -1).contiguous(), bounds.int().expand(1, n_kv, -1).contiguous()
    )


def page_of_row(n_rows: int, n_kv: int, page_size: int) -> Int[Tensor, "Hkv M"]:
    return (torch.arange(n_rows) // page_size).int().expand(n_kv, -1)


def paged(keys: Float[Tensor, "Hkv M D"], page_size: int) -> Float[Tensor, "Hkv pages rows D"]:
    """Keys page by page, float32; a short last page is filled with copies of its last row."""
    missing = -keys.shape[1] % page_size
    last = keys[:, -1:].expand(-1, missing, -1)
    return torch.cat([keys, last], 1).float().unflatten(1, (-1, page_size))


class PageChooser(BucketChooser):
    """Visits pages by score. A KV group adds its heads' softmax over pages."""

    def __init__(self, keys: LayerKeys, page_size: int):
        super().__init__(page_lists(keys.n_rows, keys.n_kv, page_size, keys.k_rope.device))
        self.order = None
        self.n_kv, self.sm_scale = keys.n_kv, keys.layer.sm_scale

    @abstractmethod
    def page_scores(self, q_rope: Float[Tensor, "n Hq D"]) -> Float[Tensor, "n Hq pages"]:
        """Logits: what the method takes for the scaled score of a page."""

    def scores(self, q_rope, budget):
        scores = self.page_scores(q_rope)
        return combine_heads(scores, self.n_kv) if budget.share == "group" else scores
