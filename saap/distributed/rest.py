"""An estimate of what no rank visits, where each rank holds some of the rows."""

import torch
from torch import Tensor

from saap.budget import Budget
from saap.kernels.rest import Moments, Scored, add_rest
from saap.kv.rest import RestOfRows, clustered, counted, empty_moments, sample_step
from saap.kv.row_sums import Clusters, RowSums
from saap.kv.store import KVStore

from .group import Group


class SplitRest:
    """Estimates from the rows of all ranks, the same on all of them.

    Clusters are found among rows of all ranks, and sums of all ranks are added up as the middle
    grows, when `saap.kv.rest` says.
    """

    def __init__(self, group: Group):
        self.group = group
        self._moments: Moments | None = None
        self._clusters: Clusters | None = None
        self._n = 0  # rows that they are of: on the host, so that no step waits for a GPU

    @property
    def nbytes(self) -> int:
        return 0 if self._moments is None else self._moments.nbytes

    def add(
        self, out: Tensor, lse: Tensor, q: Tensor, own: KVStore, n: int, n_kv: int,
        budget: Budget, scored: Scored | None, *, before: int, sm_scale: float,
        impl: str | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """To the attention of all ranks together over the rows that were chosen of n.

        `own` holds this rank's part of them, behind those of other ranks, which are `before`.
        `scored`: what all know of rows that were scored and not chosen. Every rank calls it at the
        same step.
        """
        moments = self._moments_of(own, n, before, n_kv, q)
        visited = torch.full(
            (1, n_kv if budget.share == "group" else q.shape[1], 1), budget.max_tokens,
            dtype=torch.int32, device=q.device,
        )  # fmt: skip
        return add_rest(
            out, lse, q, moments, visited,
            sm_scale=sm_scale, max_tokens=budget.max_tokens, scored=scored, impl=impl,
        )  # fmt: skip

    def _moments_of(self, own: KVStore, n: int, before: int, n_kv: int, q: Tensor) -> Moments:
        if self._moments is None or counted(self._n) != counted(n):
            dim = q.shape[2]
            if self._moments is None:
                self._moments = empty_moments(1, n_kv, dim, q.device)
            if self._clusters is None or clustered(counted(self._n)) != clustered(counted(n)):
                self._clusters = self._clusters_of(own, counted(n), before, n_kv, q)
            sums = RowSums(self._clusters)
            held = min(counted(n) - before, *own.middles) if own.middles else 0
            if held > 0:
                sums = own.rest.sums_in(self._clusters, held).copy()
            parts = [getattr(sums, name) for name in RowSums.ADDED]
            flat = self.group.add(torch.cat([part.flatten() for part in parts]))
            for part, own_part in zip(parts, flat.split([p.numel() for p in parts]), strict=True):
                part.copy_(own_part.view_as(part))
            for name, found in sums.moments().items():
                getattr(self._moments, name)[0] = found
        if self._n != n:
            self._moments.n_rows.fill_(n)
            self._n = n
        return self._moments

    def _clusters_of(self, own: KVStore, n: int, before: int, n_kv: int, q: Tensor) -> Clusters:
        """The same on all ranks: each has some rows of the sample, and zeros for the others."""
        last = clustered(n)
        shape = n_kv, -(-last // sample_step(last)), 2 * q.shape[2]
        sample = torch.zeros(shape, dtype=torch.float32, device=q.device)
        held = own.middles[0] if own.middles else 0
        if held:
            put_sample(sample, own.rest, last, before, held)
        return Clusters.of(self.group.add(sample))


def put_sample(sample: Tensor, rest: RestOfRows, last: int, before: int, held: int) -> None:
    """Those of every so many of the first `last` rows that are here: `held` rows, behind those of
    other ranks, which are `before`."""
    step = sample_step(last)
    first, end = -(-before // step), min(last, before + held)
    if first * step < end:
        rows = rest.every(0, first * step - before, end - before, step)
        sample[:, first : first + rows.shape[1]] = rows
