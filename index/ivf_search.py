"""Top-k keys within the visited buckets: one FAISS inverted file for each KV head."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .faiss_backend import InvertedFile
from .sorted_rows import SortedRows


class BucketSearch:
    """Searches FAISS's copy of the sorted rows of an index, and all pending rows one by one."""

    def __init__(self, centroids: Float[Tensor, "Hkv nlist D"], rows: SortedRows):
        self.files = [InvertedFile(own) for own in centroids]
        n = rows.n_sorted
        self.fill(rows.vectors[:, :n], rows.positions[:, :n], rows.lists, rows.second)

    @property
    def nbytes(self) -> int:
        return sum(own.ntotal * (4 * own.dim + 8) for own in self.files)

    def fill(
        self,
        vectors: Float[Tensor, "Hkv n D"],
        positions: Int[Tensor, "Hkv n"],
        buckets: Int[Tensor, "Hkv n"],
        second: Int[Tensor, "Hkv n"] | None,
    ) -> None:
        """Add keys to their bucket, or to their two buckets."""
        for head, inverted in enumerate(self.files):
            for own in (buckets, second):
                if own is not None:
                    inverted.add(vectors[head], positions[head], own[head])

    def search(
        self,
        xq: Float[Tensor, "n Hq D"],
        k: int,
        visited: Int[Tensor, "n Hq nprobe"],
        rows: SortedRows,
    ) -> tuple[Float[Tensor, "n Hq k"], Int[Tensor, "n Hq k"]]:
        """The scores, best first, and positions; -inf and -1 where fewer keys were visited."""
        group = xq.shape[1] // len(self.files)
        found = []
        for head, inverted in enumerate(self.files):
            own = slice(head * group, (head + 1) * group)
            q = xq[:, own].flatten(0, 1).float()
            wanted = k if rows.second is None else 2 * k
            scores, ids = inverted.search(q, wanted, visited[:, own].flatten(0, 1))
            scores = scores.masked_fill(ids < 0, -torch.inf)
            if rows.second is not None:
                scores, ids = without_repeats(scores, ids, k)
            if rows.n_pending:
                pending = slice(rows.n_sorted, rows.n_rows)
                more = q @ rows.vectors[head, pending].float().T
                scores, best = torch.cat([scores, more], 1).topk(k, dim=1)
                newer = rows.positions[head, pending].expand(len(q), -1)
                ids = torch.cat([ids, newer], 1).gather(1, best)
            found.append([t.unflatten(0, (-1, group)) for t in (scores, ids)])
        scores, ids = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        return scores, ids


def without_repeats(
    scores: Float[Tensor, "n m"], ids: Int[Tensor, "n m"], k: int
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The best k different ids of results in which an id occurs at most twice."""
    order = ids.sort(dim=1, stable=True)
    again = torch.zeros_like(ids, dtype=torch.bool)
    again[:, 1:] = order.values.diff(dim=1) == 0
    again = torch.zeros_like(again).scatter_(1, order.indices, again) | (ids < 0)
    best = scores.masked_fill(again, -torch.inf).topk(k, dim=1)
    return best.values, ids.masked_fill(again, -1).gather(1, best.indices)
