"""Mean pages: 16-row pages, ranked by the query's score with the mean of the page's keys.

Source: the block routing of MoBA (Lu et al., arXiv 2502.13189), here without training. A KV group
adds its heads' softmax over pages.
"""

from .pages import PAGE_SIZE, PageChooser, paged
from .snapshot import SnapshotMethod
from .tokens import key_scores


class MeanPagesChooser(PageChooser):
    def __init__(self, keys, page_size):
        super().__init__(keys, page_size)
        self.means = paged(keys.k_rope, page_size).mean(2)
        self.nbytes = self.means.numel() * keys.k_rope.element_size()

    def page_scores(self, q_rope):
        return key_scores(q_rope, self.means, self.sm_scale)


class MeanPages(SnapshotMethod):
    name = "mean-pages"

    def __init__(self, index=None, *, seed=0, page_size: int = PAGE_SIZE):
        super().__init__(index, seed=seed)
        self.page_size = page_size

    def build(self, keys):
        return MeanPagesChooser(keys, self.page_size)
