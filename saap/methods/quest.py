"""Quest: 16-row pages, ranked by an upper bound of the best score within the page's min/max box.

Source: Tang et al., arXiv 2406.10774. Quest selects for each query head; a KV group adds its
heads' softmax over the bounds.
"""

import torch

from .pages import PAGE_SIZE, PageChooser, paged
from .snapshot import SnapshotMethod
from .tokens import key_scores


class QuestChooser(PageChooser):
    def __init__(self, keys, page_size):
        super().__init__(keys, page_size)
        pages = paged(keys.k_rope, page_size)
        self.box = torch.cat([pages.amax(2), pages.amin(2)], -1)  # [Hkv, pages, 2 D]
        self.nbytes = self.box.numel() * keys.k_rope.element_size()

    def page_scores(self, q_rope):
        q = q_rope.float()
        # sum_d max(q_d max_d, q_d min_d): the maximum where q is positive, else the minimum.
        return key_scores(torch.cat([q.clamp(min=0), q.clamp(max=0)], -1), self.box, self.sm_scale)


class Quest(SnapshotMethod):
    name = "quest"

    def __init__(self, index=None, *, seed=0, page_size: int = PAGE_SIZE):
        super().__init__(index, seed=seed)
        self.page_size = page_size

    def build(self, keys):
        return QuestChooser(keys, self.page_size)
