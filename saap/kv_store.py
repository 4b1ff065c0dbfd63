"""The KV store of one layer: `sinks | middle by list | tail in time order`, grown in place.

The bucket-sorted store *is* the cache: keys and values are held once. New tokens go to the tail;
when more than `window + flush_every` are there, the oldest `flush_every` join the lists of the
middle (Saap, arXiv 2502.08246, section 3.3). Attention does not care about the order of rows.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saap.kernels.attention.api import attend_ranges

from .budget import Budget, check_predicts_weights
from .chunks import OutAndLse, attend_chunk
from .kv_checks import check_append
from .kv_rows import KVRows
from .routing import LayerRouting
from .selection import StepRanges

ASSIGNED_AT_ONCE = 2048


class KVStore:
    """Keys, values and inverted lists of one layer, for B sequences that grow together.

    Sequences may have different lengths: padding is never stored, so a sequence has the same rows
    and the same results alone and in a batch. `routing` None keeps the layer dense. Not
    differentiable; not for several threads.

    Args:
        routing: partition and router of the layer, on the device of the keys.
        budget: what a step visits. `n_sink`, `window` and `flush_every` also lay out the rows.
        capacity: tokens a sequence to make room for at the first append.
    """

    def __init__(self, routing: LayerRouting | None, budget: Budget, *, capacity: int = 0):
        self.budget, self.routing = budget, None
        self.rows, self.capacity = KVRows(), capacity
        self.flush_every = budget.flush_every
        self.lengths: list[int] = []
        self.middles: list[int] = []  # rows of each sequence that are in lists
        self._new: list[int] = []  # tokens of the last append, by sequence
        self._length_new = 0
        self._pending: Tensor | None = None  # de-RoPEd keys of the latest tokens: no list yet
        self._n_pending = 0
        self._ranges: StepRanges | None = None
        if routing is not None:
            self.route_by(routing)

    def route_by(self, routing: LayerRouting) -> None:
        """Put tokens into the lists of this routing; for a store that holds none yet."""
        if self.length:
            raise ValueError(f"route_by with {self.length} tokens: accepted is an empty store")
        if (self.budget.nprobe or 0) > routing.n_lists:
            raise ValueError(
                f"nprobe={self.budget.nprobe}: accepted are 1 to nlist={routing.n_lists}"
            )
        check_predicts_weights(routing.predicts_weights, self.budget)
        self.routing = routing

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths, default=0)

    @property
    def k(self) -> Float[Tensor, "B Hkv capacity D"]:
        return self.rows.k

    @property
    def v(self) -> Float[Tensor, "B Hkv capacity D"]:
        return self.rows.v

    @property
    def nbytes(self) -> int:
        """Bytes held: keys, values, numbers of lists and tokens, ranges, pending keys."""
        pending = 0 if self._pending is None else self._pending.nbytes
        return self.rows.nbytes + pending + (self._ranges.nbytes if self._ranges else 0)

    @property
    def visited_share(self) -> float:
        """Rows that the last decode step visited, of all rows; averaged over heads."""
        return 1.0 if self._ranges is None else self._ranges.visited_share(self.lengths)

    def reserve(self, n: int, like: Float[Tensor, "B Hkv T D"] | None = None) -> None:
        """Make room for n tokens a sequence now. MemoryError leaves everything as it was."""
        like = self.rows.k if like is None else like
        if like is None:
            raise ValueError("reserve before the first append: accepted is one with like=keys")
        self.rows.reserve(n, like, self.length)

    def append(
        self,
        k_rope: Float[Tensor, "B Hkv T D"],
        v: Float[Tensor, "B Hkv T D"],
        k_derope: Float[Tensor, "B Hkv T D"],
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> None:
        """Add T tokens to each sequence, but not those whose `mask` is False: padding on the left.

        Raises ValueError for shapes or a batch that do not fit, MemoryError when it cannot grow;
        nothing is changed then.
        """
        n_kv = None if self.routing is None else len(self.routing.centroids)
        check_append(k_rope, v, k_derope, mask, lengths=self.lengths, held=self.k, n_kv=n_kv)
        batch, _, length, _ = k_rope.shape
        new = [length] * batch if mask is None else mask.sum(1).tolist()
        self.flush()
        lengths = self.lengths or [0] * batch
        longest = max(a + b for a, b in zip(lengths, new, strict=True))
        self.rows.reserve(max(longest, self.capacity), k_rope, self.length)
        if not self.lengths:
            self.lengths, self.middles = lengths, [0] * batch
        lists = self._lists_of_new(k_derope, new)
        if len(set(self.lengths)) == 1 and new == [length] * batch:
            self.rows.write(slice(None), self.lengths[0], k_rope, v, lists)
        else:
            for b, n in enumerate(new):
                own = lists if isinstance(lists, int) else lists[b, :, length - n :]
                ends = k_rope[b, :, length - n :], v[b, :, length - n :]
                self.rows.write(b, self.lengths[b], *ends, own)
        self.lengths = [a + b for a, b in zip(self.lengths, new, strict=True)]
        self._new, self._length_new = new, length

    def attend(
        self,
        q_rope: Float[Tensor, "B Hq T D"],
        q_derope: Float[Tensor, "B Hq T D"],
        budget: Budget | None = None,
        *,
        sm_scale: float | None = None,
        softcap: float | None = None,
        impl: str | None = None,
    ) -> OutAndLse:
        """Attention of the T tokens appended last: `out [B, Hq, T, D]`, `lse [B, Hq, T]` float32.

        One token visits what the budget says, sinks and tail in any case; several are exact dense
        attention. `budget`: another bound of the selection than the store's own. 0 and -inf where
        there is padding. Raises ValueError when T is not the number appended last.
        """
        if not self._new or q_rope.shape[2] != self._length_new or len(q_rope) != self.batch:
            raise ValueError(
                f"q has batch {len(q_rope)} and {q_rope.shape[2]} tokens: accepted are those "
                f"appended last, {self.batch} and {self._length_new if self._new else 0}"
            )
        sm_scale = q_rope.shape[-1] ** -0.5 if sm_scale is None else sm_scale
        if q_rope.shape[2] > 1:
            return self._attend_chunk(q_rope, sm_scale, softcap)
        self._flush()
        q = q_rope[:, :, 0]
        starts, lengths = self._select(q_derope[:, :, 0], budget or self.budget)
        out, lse = attend_ranges(
            q, self.k, self.v, starts, lengths, sm_scale=sm_scale, softcap=softcap, impl=impl
        )
        return out.unsqueeze(2), lse.unsqueeze(2)

    def _select(self, q_derope: Float[Tensor, "B Hq D"], budget: Budget):
        """`starts, lengths` of all that one token of each sequence visits."""
        if self._ranges is None:
            self._ranges = StepRanges(self.budget.n_sink, self.rows.k)
            self._recount()
        if not any(self.middles) or self.length <= budget.dense_below:
            return self._ranges.dense(self.lengths)
        return self._ranges.selected(self.lengths, self.middles, self.routing, q_derope, budget)

    def _attend_chunk(self, q, sm_scale, softcap) -> OutAndLse:
        length, options = q.shape[2], {"sm_scale": sm_scale, "softcap": softcap}
        if len(set(self.lengths)) == 1 and min(self._new) == length:
            n = self.lengths[0]
            return attend_chunk(q, self.k[:, :, :n], self.v[:, :, :n], **options)
        out = torch.zeros_like(q)
        lse = torch.full(q.shape[:3], -torch.inf, device=q.device)
        for b, (n, n_new) in enumerate(zip(self.lengths, self._new, strict=True)):
            if n_new:
                own, rows = slice(b, b + 1), slice(length - n_new, length)
                out[own, :, rows], lse[own, :, rows] = attend_chunk(
                    q[own, :, rows], self.k[own, :, :n], self.v[own, :, :n], **options
                )
        return out, lse

    def flush(self) -> None:
        """Put into lists what is due: after it, where rows lie depends on the tokens alone.

        Ends a chunk of several tokens, which can no longer be attended from.
        """
        if self._length_new > 1:
            self._new = []
        self._flush()

    def settle(self) -> None:
        """As `flush`, and every token has the number of its list: ready to be saved."""
        self.flush()
        self._assign_pending()

    def _flush(self) -> None:
        due = [max(0, self._due(n) - m) for n, m in zip(self.lengths, self.middles, strict=True)]
        if not any(due):
            return
        self._assign_pending()
        for b, n_due in enumerate(due):
            if n_due:
                self._insert(b, n_due)
        self._recount()

    def _due(self, length: int) -> int:
        """How many rows the lists hold when a sequence has grown to this length."""
        if self.routing is None:
            return 0
        spare = length - self.budget.n_sink - self.budget.window
        return self.flush_every * max(0, -(-spare // self.flush_every) - 1)

    def _insert(self, b: int, n_due: int) -> None:
        """The oldest rows of the tail go behind the others of their lists."""
        first, old = self.budget.n_sink, self.middles[b]
        lists = self.rows.lists[b, :, first : first + old + n_due]
        order = lists.argsort(dim=1, stable=True)
        self.rows.permute(b, first, order, n_kept=old)
        self.middles[b] = old + n_due

    def truncate(self, n_dropped: int | Sequence[int]) -> None:
        """Forget the last tokens of each sequence; the window before them is whole again.

        Raises ValueError when sinks would go while later tokens stay: accepted are all tokens, or
        so few that the sinks are left.
        """
        dropped = [n_dropped] * self.batch if isinstance(n_dropped, int) else list(n_dropped)
        left = [n - d for n, d in zip(self.lengths, dropped, strict=True)]
        for n, after in zip(self.lengths, left, strict=True):
            if after > n or 0 < after < min(n, self.budget.n_sink) or after < 0:
                raise ValueError(
                    f"{after} tokens of {n} would be left: accepted are 0 and "
                    f"{min(n, self.budget.n_sink)} to {n}, because the first "
                    f"{self.budget.n_sink} are sinks"
                )
        if not any(dropped):
            return
        self._assign_pending()
        before = list(self.middles)
        for b, n in enumerate(left):
            if n - self.budget.n_sink - self.middles[b] < self.budget.window:
                self._lay_out(b, n)
        self.lengths, self._new = left, []
        if self.middles != before:
            self._recount()

    def _lay_out(self, b: int, length: int) -> None:
        """The order of rows as if the sequence had never been longer."""
        first, n_middle = self.budget.n_sink, min(self.middles[b], self._due(length))
        if n_middle == self.middles[b]:
            return
        used = slice(first, self.lengths[b])
        tokens, lists = self.rows.tokens[b, :, used].long(), self.rows.lists[b, :, used].long()
        n = self.lengths[b]
        in_lists = tokens < first + n_middle
        key = torch.where(in_lists, lists * n, lists.max() * n + n) + tokens
        self.rows.permute(b, first, key.argsort(dim=1))
        self.middles[b] = n_middle

    def select_sequences(self, sequences: Sequence[int] | Tensor) -> None:
        """Sequence i becomes what `sequences[i]` was: beams, their repetition, fewer sequences."""
        chosen = torch.as_tensor(sequences, device="cpu")
        if not self.batch:
            return
        wrong = [i for i in chosen.tolist() if not 0 <= i < self.batch]
        if wrong:
            raise ValueError(f"sequence {wrong[0]}: accepted are 0 to {self.batch - 1}")
        self._assign_pending()
        self.rows.select(chosen, self.length)
        for name in ("lengths", "middles", "_new"):
            held = getattr(self, name)
            setattr(self, name, [held[i] for i in chosen.tolist()] if held else [])
        self._pending, self._ranges = None, None

    def _recount(self) -> None:
        if self._ranges is not None:
            self._ranges.recount(self.rows.lists, self.rows.tokens, self.middles, self.routing)

    def _lists_of_new(self, k_derope: Tensor, new: list[int]) -> Tensor | int:
        """Lists of the new tokens; single tokens wait (-1), to be assigned many at a time."""
        batch, heads, length, dim = k_derope.shape
        if self.routing is None:
            return -1
        if length == 1 and min(new) == 1:
            if self._pending is None:
                self._pending = k_derope.new_empty(batch, heads, self.budget.flush_every, dim)
            if self._n_pending == self._pending.shape[2]:
                self._assign_pending()
            self._pending[:, :, self._n_pending] = k_derope[:, :, 0]
            self._n_pending += 1
            return -1
        self._assign_pending()
        parts = k_derope.split(ASSIGNED_AT_ONCE, dim=2)
        return torch.cat([self.routing.assign(part) for part in parts], 2)

    def _assign_pending(self) -> None:
        if self._n_pending == 0:
            return
        lists = self.routing.assign(self._pending[:, :, : self._n_pending])
        for b, n in enumerate(self.lengths):
            self.rows.lists[b, :, n - self._n_pending : n] = lists[b]
        self._n_pending = 0
