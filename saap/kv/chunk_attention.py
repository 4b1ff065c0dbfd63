"""Attention of several new tokens of each sequence of a store: exact, or by a prefill budget."""

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from saap.budget import Budget
from saap.prefill import PrefillBudget

from .chunks import OutAndLse, attend_chunk, attend_visible
from .sparse_chunks import RowsRead, attend_sparse_chunk


class ChunkAttention:
    """Counts what it visits in `rows_read`."""

    def __init__(self, prefill: PrefillBudget | None, budget: Budget):
        self.prefill, self._budget = prefill, budget
        self.rows_read = RowsRead()

    def attend(
        self,
        q: Float[Tensor, "B Hq T D"],
        k: Shaped[Tensor, "B Hkv capacity width"],
        v: Shaped[Tensor, "B Hkv capacity width"],
        lengths: list[int],
        new: list[int],
        **options,
    ) -> OutAndLse:
        """Sequence b has `lengths[b]` rows in use, of which the last `new[b]` are of these tokens,
        its last ones. `options`: as `attend_chunk`. 0 and -inf where there is padding."""
        length = q.shape[2]
        alike = len(set(lengths)) == 1 and min(new) == length
        if alike and self.prefill is None:
            n = lengths[0]
            self.rows_read.add(length, n - length)
            return attend_chunk(q, k[:, :, :n], v[:, :, :n], **options)
        out = torch.zeros_like(q)
        lse = torch.full(q.shape[:3], -torch.inf, device=q.device, dtype=torch.float32)
        for b, (n, n_new) in enumerate(zip(lengths, new, strict=True)):
            if n_new:
                own, last = slice(b, b + 1), slice(length - n_new, length)
                out[own, :, last], lse[own, :, last] = self._of_sequence(
                    q[own, :, last], k[own, :, :n], v[own, :, :n], **options
                )
        return out, lse

    def attend_visible(
        self,
        q: Float[Tensor, "B Hq T D"],
        k: Shaped[Tensor, "B Hkv capacity width"],
        v: Shaped[Tensor, "B Hkv capacity width"],
        visible: Bool[Tensor, "B T slots"],
        tokens: Bool[Tensor, "B slots"],
        **options,
    ) -> OutAndLse:
        """Each token sees what `visible` says. Rows are those of `tokens`, in their order."""
        out = torch.zeros_like(q)
        lse = torch.full(q.shape[:3], -torch.inf, device=q.device, dtype=torch.float32)
        length = q.shape[2]
        for b, own in enumerate(tokens):
            n = int(own.sum())
            n_new = min(length, int(own[-length:].sum()))
            if not n_new:
                continue
            one, last = slice(b, b + 1), slice(length - n_new, length)
            self.rows_read.add(n_new, n - n_new)
            out[one, :, last], lse[one, :, last] = attend_visible(
                q[one, :, last], k[one, :, :n], v[one, :, :n], visible[one, last][..., own],
                **options,
            )  # fmt: skip
        return out, lse

    def _of_sequence(self, q, k, v, **options) -> OutAndLse:
        if self.prefill is None:
            self.rows_read.add(q.shape[2], k.shape[2] - q.shape[2])
            return attend_chunk(q, k, v, **options)
        places = {"n_sink": self._budget.n_sink, "window": self._budget.window}
        return attend_sparse_chunk(q, k, v, self.prefill, **places, **options, read=self.rows_read)
