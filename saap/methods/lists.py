"""Selectors over the lists of a partition: a list for each key when it comes, whole lists visited.

A list is a bucket of the partition or, with `n_segments` above 1, a cell: one of the time segments
of a bucket (`saap.index.cells`).
"""

import copy
from abc import abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saap.budget import Budget
from saap.index.cells import cells_of
from saap.index.kmeans import assign
from saap.index.lists import offsets_of, sizes_of
from saap.kernels.routing import select_lists
from saap.selector import Middle, Query, RangeBuffer, Selector


class ListSelector(Selector):
    """Visits the lists with the highest scores; subclasses say how a list is scored."""

    assigns_by = "derope"
    layer_number = 0
    predicts_weights = False
    """Whether scores per row are attention weights, as `budget.min_weight` needs."""

    def __init__(self, centroids: Float[Tensor, "Hkv nlist D"], n_segments: int = 1):
        self.centroids, self.n_segments = centroids, n_segments
        self.n_kv, self.n_assigned = centroids.shape[:2]
        self.sizes: Int[Tensor, "B Hkv n_lists"] | None = None
        self.offsets: Int[Tensor, "B Hkv n_lists_plus_1"] | None = None

    @property
    def n_lists(self) -> int:
        return self.n_assigned * self.n_segments

    @property
    def bounds(self) -> tuple[str, ...]:
        own = ("nprobe", "max_tokens", "top_p")
        return (*own, "min_weight") if self.predicts_weights else own

    def check_budget(self, budget: Budget) -> None:
        if budget.min_weight is not None and not self.predicts_weights:
            raise ValueError(
                "min_weight needs a router that predicts attention weights, the trained network "
                f"or cells; got min_weight={budget.min_weight} for one that does not"
            )
        super().check_budget(budget)
        if (budget.nprobe or 0) > self.n_lists:
            raise ValueError(f"nprobe must be in 1..{self.n_lists}; got {budget.nprobe}")

    def for_view(self) -> "ListSelector":
        """One that scores alike, for another middle; neither changes what the other chooses."""
        return copy.copy(self)

    def assign(self, keys):
        return assign(keys, self.centroids)

    def update(self, middle: Middle) -> None:
        """Count the rows of each list."""
        shape = (len(middle.n_rows), middle.n_kv, self.n_lists)
        sizes = torch.zeros(shape, dtype=torch.int32, device=middle.device)
        for b, n in enumerate(middle.n_rows):
            if n:
                lists = middle.lists[b, :, :n]
                if self.n_segments > 1:
                    place = middle.tokens[b, :, :n] - middle.first_row
                    lists = cells_of(lists, place, n, self.n_segments)
                sizes[b] = sizes_of(lists, self.n_lists)
        self.sizes, self.offsets = sizes, offsets_of(sizes)
        smallest = sizes.masked_fill(sizes == 0, torch.iinfo(torch.int32).max).sort(-1).values
        self._smallest = smallest.long().cumsum(-1)
        self._most: dict[int, int] = {}

    def ranks_by_row(self, budget: Budget) -> bool:
        """Whether scores are worth per row; otherwise they are worth per list."""
        return False

    @abstractmethod
    def scores(self, query: Query, middle: Middle, budget: Budget) -> Float[Tensor, "n H n_lists"]:
        """Higher is visited first. `H` is Hkv for `budget.share="group"`, else Hq."""

    def select(self, query: Query, middle: Middle, budget: Budget, room: RangeBuffer):
        scores = self.scores(query, middle, budget)
        most = self._bound(budget)
        return select_lists(
            scores,
            self.offsets,
            nprobe=most,
            max_tokens=budget.max_tokens,
            top_p=budget.top_p,
            min_score=budget.least_weight(self.layer_number),
            per_row=self.ranks_by_row(budget),
            first_row=middle.first_row,
            out=room.take(*scores.shape[:2], most, scores.device),
            impl=query.impl,
        )

    def _bound(self, budget: Budget) -> int:
        """The most lists that the budget can reach: no more ranges are sorted or carried along."""
        most = self.n_lists if budget.nprobe is None else min(budget.nprobe, self.n_lists)
        if budget.max_tokens is None:
            return most
        if budget.max_tokens not in self._most:
            reached = (self._smallest < budget.max_tokens).sum(-1).max()
            self._most[budget.max_tokens] = min(self.n_lists, int(reached) + 1)
        return min(most, self._most[budget.max_tokens])
