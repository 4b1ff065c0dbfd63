"""FAISS's top-k over the rows of a KV store: an `AsymmetricIVF` that is a view of them."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saap.budget import Budget, is_integer
from saap.index import checks
from saap.index.ivf import AsymmetricIVF
from saap.index.sorted_rows import SortedRows
from saap.methods.lists import ListSelector
from saap.selector import Middle, Query, RangeBuffer

from .store import KVStore


class StoreIndex(AsymmetricIVF):
    """The rows in lists of one sequence of a store, searched by key and visited as the store does.

    Made by `KVStore.as_index`. Vectors are the store's own rows, keys with RoPE on them, and
    positions are numbers of tokens. Lists are scored by the store's selector, for a query of the
    newest token: `search(q_rope, k, nprobe, route_by=q_derope)` finds the k best keys among the
    rows that a step with that `nprobe` visits in the middle. Where the store has cells, `nprobe`
    counts cells.

    A view cannot be changed, and ends when rows of the store move: make a new one then.
    """

    def __init__(self, store: KVStore, sequence: int = 0):
        if store.kv_dtype == torch.int8:
            raise ValueError(
                "a store must hold floats to be searched as an index; got kv_dtype torch.int8"
            )
        selector = store.selector
        if not isinstance(selector, ListSelector) or not selector.ready:
            raise ValueError(
                "a store must keep its rows in lists to be searched as an index; got "
                f"{'no selector' if selector is None else type(selector).__name__}"
                f"{'' if selector is None or selector.ready else ' without a partition yet'}"
            )
        if store.batch == 0:
            raise ValueError("a store must hold tokens to be searched as an index; got none")
        if not is_integer(sequence, 0) or sequence >= store.batch:
            raise ValueError(f"sequence must be in 0..{store.batch - 1}; got {sequence!r}")
        store.flush()
        whole, n = store.middle, store.middles[sequence]
        own = slice(sequence, sequence + 1)
        k, lists, tokens = (t[own, :, :n] for t in (whole.k, whole.lists, whole.tokens))
        self._middle = Middle(k, lists, tokens, [n], whole.first_row)
        self._selector = selector.for_view()
        self._selector.update(self._middle)
        self._asks_at = store.lengths[sequence] - 1
        self._store, self._seen = store, selector.offsets
        super().__init__(k.shape[-1], k.shape[1], selector.n_lists, dtype=k.dtype, device=k.device)
        self.centroids = selector.centroids.repeat_interleave(selector.n_segments, 1)
        # Cells are numbered otherwise than the store's buckets: their numbers follow from offsets.
        own_lists = lists[0] if selector.n_segments == 1 else None
        self._rows = SortedRows(k[0], tokens[0], self._selector.offsets[0], lists=own_lists)

    @property
    def nbytes(self) -> int:
        """Memory beside the store's own: what FAISS holds once `search` has copied keys to it."""
        return 0 if self._faiss is None else self._faiss.nbytes

    def route(self, xq: Float[Tensor, "n Hq D"]) -> Float[Tensor, "n Hq nlist"]:
        return self._list_scores(xq, xq, "head")

    def select(
        self,
        xq: Float[Tensor, "n Hq D"],
        *,
        nprobe: int | None = None,
        max_tokens: int | None = None,
        top_p: float | None = None,
        share: str = "group",
    ) -> tuple[Int[Tensor, "n H R"], Int[Tensor, "n H R"]]:
        """As `AsymmetricIVF.select`, by the selector of the store; rows are those of `vectors`."""
        budget = Budget(nprobe=nprobe, max_tokens=max_tokens, top_p=top_p, share=share)
        self._selector.check_budget(budget)
        query = self._query(xq, xq)
        starts, lengths = self._selector.select(query, self._middle, budget, RangeBuffer(0))
        return (starts - self._middle.first_row).clamp(min=0), lengths

    def _list_scores(self, xq, route_by, share: str):
        budget = Budget(nprobe=self.nlist, share=share)
        return self._selector.scores(self._query(xq, route_by), self._middle, budget)

    @property
    def vectors(self):
        self._check_current()
        return super().vectors

    @property
    def positions(self):
        self._check_current()
        return super().positions

    @property
    def offsets(self):
        self._check_current()
        return super().offsets

    def flush(self) -> None:
        self._check_current()

    def _check_current(self) -> None:
        if self._store.selector.offsets is not self._seen:
            raise ValueError(
                "an index of a KV store must be made after its rows moved for the last time; got "
                "one of before: call as_index again"
            )

    def _query(self, xq: Tensor, route_by: Tensor) -> Query:
        self._check_current()
        checks.queries("xq", xq, self.n_kv, self.d)
        checks.queries("route_by", route_by, self.n_kv, self.d)
        positions = torch.full((len(xq),), self._asks_at, device=xq.device)
        return Query(xq, route_by, positions)

    def _refuse(self, what: str):
        raise ValueError(
            "an index of a KV store must not be changed or saved: append to the store and call "
            f"as_index again, or save a context; got {what}"
        )

    def add(self, *_, **__):
        self._refuse("add")

    def remove(self, *_, **__):
        self._refuse("remove")

    def truncate(self, *_, **__):
        self._refuse("truncate")

    def train(self, *_, **__):
        self._refuse("train")

    def refine(self, *_, **__):
        self._refuse("refine")

    def save(self, *_, **__):
        self._refuse("save")
