"""An estimate of what no rank visits, where each rank holds some of the rows."""

import torch
from torch import Tensor

from saap.budget import Budget
from saap.kernels.rest import Moments, add_rest
from saap.kv.rest import as_moments, counted
from saap.kv.store import KVStore

from .group import Group


class SplitRest:
    """Estimates from the rows of all ranks, the same on all of them.

    Sums of all ranks are added up as the middle grows (`saap.kv.rest.counted`). What they leave
    out, keys very far from the others, each rank judges by its own first rows.
    """

    def __init__(self, group: Group):
        self.group = group
        self._moments: Moments | None = None
        self._n = 0  # rows that they are of: on the host, so that no step waits for a GPU

    @property
    def nbytes(self) -> int:
        return 0 if self._moments is None else self._moments.nbytes

    def add(
        self, out: Tensor, lse: Tensor, q: Tensor, own: KVStore, n: int, n_kv: int,
        budget: Budget, *, before: int, sm_scale: float, impl: str | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """To the attention of all ranks together over the rows that were chosen of n.

        `own` holds this rank's part of them, behind those of other ranks, which are `before`.
        Every rank calls it at the same step.
        """
        moments = self._moments_of(own, n, before, n_kv, q)
        visited = torch.full(
            (1, n_kv if budget.share == "group" else q.shape[1], 1), budget.max_tokens,
            dtype=torch.int32, device=q.device,
        )  # fmt: skip
        return add_rest(
            out, lse, q, moments, visited,
            sm_scale=sm_scale, max_tokens=budget.max_tokens, impl=impl,
        )  # fmt: skip

    def _moments_of(self, own: KVStore, n: int, before: int, n_kv: int, q: Tensor) -> Moments:
        if self._moments is None or counted(self._n) != counted(n):
            dim, device = q.shape[2], q.device
            flat = torch.zeros(n_kv, 1 + 2 * dim + 2 * dim * dim, dtype=torch.float64)
            held = max(0, min(counted(n) - before, *own.middles)) if own.middles else 0
            if held:
                (sums,) = own.rest.sums([held])
                flat = torch.cat([t.flatten(1) for t in sums.about_zero()], 1)
            flat = self.group.add(flat.to(device).contiguous())
            kept, total, products = flat.split([1, 2 * dim, 2 * dim * dim], 1)
            spread, means = as_moments(
                kept[:, None], total[:, None], products.view(n_kv, dim, 2 * dim)
            )
            rows = torch.zeros(1, dtype=torch.int32, device=device)
            self._moments = Moments(spread[None].bfloat16(), means[None].float(), rows)
        if self._n != n:
            self._moments.n_rows.fill_(n)
            self._n = n
        return self._moments
