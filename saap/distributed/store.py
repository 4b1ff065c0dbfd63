"""The KV store of one layer where each rank of a group holds a part of the context's rows.

A `SplitStore` answers as a `KVStore` does, of the whole context; it keeps its own part in one.
Every rank makes the same calls with the same tensors: all hold the whole model.
"""

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from saap.budget import Budget
from saap.kernels.attention.api import attend_ranges
from saap.kernels.attention.merge import merge_states
from saap.kv.checks import check_append, check_kv_dtype, check_query, numbers_of
from saap.kv.chunks import OutAndLse, attend_chunk, attend_past
from saap.kv.store import KVStore
from saap.methods.saap import SaapSelector
from saap.selector import Selector
from saap.stateful import stateful

from .group import Group
from .parts import begins_of, check_parts, even_parts
from .rest import SplitRest
from .selector import SplitSelector


class SplitStore:
    """Rows of one layer, of one sequence, over the ranks of a group.

    Rank r holds the tokens from `begins[r]` to `begins[r + 1]`, the last rank all that follow.
    Sinks, middle and tail are those of the whole context, and a step's selection is the one that a
    single process makes. Other methods than `saap` and `dense` are refused.

    Args:
        selector: of this layer, made for this store alone; None attends densely.
        budget: what a step visits, of all ranks together.
        group: the processes.
        parts: tokens of each rank but the last; None shares out the tokens that come first.
        kv_dtype: as for a `KVStore`.
    """

    def __init__(
        self,
        selector: Selector | None,
        budget: Budget,
        group: Group,
        parts: Sequence[int] | None = None,
        kv_dtype: torch.dtype | None = None,
    ):
        check_parts(parts, group)
        if selector is not None:
            if type(selector) is not SaapSelector:
                raise ValueError(
                    "a split context must use method saap or dense, whose choice over several "
                    f"ranks is built; got {type(selector).__name__}"
                )
            selector = SplitSelector(selector, group)
            selector.check_budget(budget)
        self.selector, self.budget, self.group = selector, budget, group
        check_kv_dtype(kv_dtype)
        self.kv_dtype = kv_dtype
        self._parts = parts
        self.begins = None if parts is None else begins_of(parts)
        self.own: KVStore | None = None
        self.rest = SplitRest(group)
        self.lengths: list[int] = []
        self.middles: list[int] = []
        self._new = (0, 0, 0)  # tokens of the last append; from where to where they are our own
        self._n_kv = self._dim = 0

    in_time_order = False
    """Its rows are in the memories of several ranks."""

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def length(self) -> int:
        """Tokens of the whole context."""
        return self.lengths[0] if self.lengths else 0

    @property
    def own_length(self) -> int:
        """Tokens that this rank holds."""
        return 0 if self.own is None else self.own.length

    @property
    def nbytes(self) -> int:
        """Bytes that this rank holds."""
        return self.rest.nbytes + (self.own.nbytes if self.own_length else 0)

    @property
    def visited_rows(self) -> float:
        """Rows of this rank that the last step visited, per head."""
        return self.own.visited_rows if self.own_length else 0.0

    @property
    def visited_share(self) -> float:
        """Share of this rank's rows that the last step visited."""
        return self.own.visited_share if self.own_length else 1.0

    def reserve(self, n: int, like: Tensor | None = None) -> None:
        """Room is made as tokens come."""

    @stateful
    def append(
        self,
        k_rope: Float[Tensor, "B Hkv T D"],
        v: Float[Tensor, "B Hkv T D"],
        k_derope: Float[Tensor, "B Hkv T D"],
        mask: Tensor | None = None,
    ) -> None:
        """Add T tokens; each rank keeps those of its part. Raises ValueError as `KVStore.append`,
        for more than one sequence, and for fewer tokens than ranks."""
        if len(k_rope) != 1 or mask is not None:
            raise ValueError(
                "a split context must be one sequence without padding; got "
                f"{'a batch of ' + str(len(k_rope)) if mask is None else 'a mask with padding'}"
            )
        held = self.own.k if self.own_length else None
        lengths = self.lengths if held is not None else []
        check_append(
            k_rope, v, k_derope, None,
            lengths=lengths, held=held, n_kv=None, kv_dtype=self.kv_dtype,
        )  # fmt: skip
        new, before = k_rope.shape[2], self.length
        self._flush(at_step=False)
        if self.own is None:
            self._place(new)
        first, last = self._tokens
        start, stop = (min(max(at - before, 0), new) for at in (first, last))
        if start < stop:
            self.own.append(*(t[:, :, start:stop] for t in (k_rope, v, k_derope)))
        self.lengths, self.middles = [before + new], self.middles or [0]
        self._new, self._n_kv, self._dim = (new, start, stop), k_rope.shape[1], k_rope.shape[3]

    def _place(self, n_tokens: int) -> None:
        if self.begins is None:
            self.begins = begins_of(even_parts(n_tokens, self.group))
        first, last = self._tokens
        n_sink = min(max(self.budget.n_sink - first, 0), last - first)
        own = dataclasses.replace(self.budget, n_sink=n_sink)
        capacity = 0 if self.group.rank + 1 == self.group.size else last - first
        self.own = KVStore(
            self.selector, own, capacity=capacity, kv_dtype=self.kv_dtype, steered=True
        )

    @property
    def _tokens(self) -> tuple[int, int]:
        """The first token of this rank, and the first after those that it is to hold."""
        rank = self.group.rank
        last = self.begins[rank + 1] if rank + 1 < self.group.size else 2**31 - 1
        return self.begins[rank], last

    def again(self, *_, **__) -> None:
        """Every step is a general one."""

    def step(
        self,
        k_rope: Tensor,
        v: Tensor,
        k_derope: Tensor,
        q_rope: Tensor,
        q_derope: Tensor,
        **options: float | None,
    ) -> OutAndLse:
        """`append` and `attend`, as `KVStore.step`."""
        self.append(k_rope, v, k_derope)
        return self.attend(q_rope, q_derope, **options)

    @stateful
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
        """As `KVStore.attend`: each rank over its own rows, merged in the order of ranks.

        The same on all ranks, to the bit, where they computed the same queries.
        """
        new, start, stop = self._new
        check_query(q_rope, q_derope, batch=self.batch, n_new=new, n_kv=self._n_kv, dim=self._dim)
        sm_scale = q_rope.shape[-1] ** -0.5 if sm_scale is None else sm_scale
        if self.selector is not None:
            self.selector.observe(q_rope, [new])
        if new > 1:
            return self._merged(*self._chunk(q_rope, start, stop, sm_scale, softcap))
        self._flush(at_step=True)
        q, budget = q_rope[:, :, 0], budget or self.budget
        chooses = bool(
            self.selector is not None and self.middles[0] and self.length > budget.dense_below
        )
        found = self._merged(*self._step(q, budget, chooses, sm_scale, softcap, impl))
        leaves_out = chooses and budget.max_tokens < self.middles[0]
        if leaves_out and budget.estimate_rest and softcap is None:
            found = self.rest.add(
                *found,
                q,
                self.own,
                self.middles[0],
                self._n_kv,
                budget,
                self.selector.left_out,
                before=max(0, self._tokens[0] - self.budget.n_sink),
                sm_scale=sm_scale,
                impl=impl,
            )
        out, lse = found
        return out.unsqueeze(2), lse.unsqueeze(2)

    def _step(self, q, budget: Budget, chooses: bool, sm_scale, softcap, impl) -> OutAndLse:
        chosen = None
        if chooses:
            # Triton's kernels are of attention alone.
            choosing = None if impl == "triton" else impl
            middle = self.own.middle if self.own_length else None
            local_lse = self.own.local_lse(q, sm_scale, softcap) if self.own_length else None
            chosen = self.selector.select_together(
                q, local_lse, middle, self.middles[0], budget, choosing
            )
        if not self.own_length:
            return _nothing(q)
        starts, lengths = self.own.with_local(chosen, 0, 1)
        return attend_ranges(
            q, self.own.k, self.own.v, starts, lengths,
            sm_scale=sm_scale, softcap=softcap, impl=impl,
        )  # fmt: skip

    def _chunk(self, q: Tensor, start: int, stop: int, sm_scale, softcap) -> OutAndLse:
        """Tokens `start..stop` of the chunk are this rank's: those before see what it held before
        them, those after all of it."""
        n, options = self.own_length, {"sm_scale": sm_scale, "softcap": softcap}
        if start == stop:
            start = stop = 0  # every token sees all, or there is nothing to see
        k, v = (self.own.k[:, :, :n], self.own.v[:, :, :n]) if n else (None, None)
        past, parts = n - (stop - start), []
        for first, last, seen in ((0, start, past), (stop, q.shape[2], n)):
            own = q[:, :, first:last]
            if first < last and seen:
                found = attend_past(own, k[:, :, :seen], v[:, :, :seen], **options)
                parts.append((first, last, found))
        if start < stop:
            parts.append((start, stop, attend_chunk(q[:, :, start:stop], k, v, **options)))
        out, lse = _nothing(q)
        for first, last, found in parts:
            out[:, :, first:last], lse[:, :, first:last] = found
        return out, lse

    def _merged(self, out: Tensor, lse: Tensor) -> OutAndLse:
        """One collective of D + 1 floats for each query and head."""
        both = torch.cat([out.float(), lse.unsqueeze(-1)], -1)
        every = self.group.gather(both)
        merged = every[0][..., :-1], every[0][..., -1]
        for other in every[1:]:
            merged = merge_states(*merged, other[..., :-1], other[..., -1])
        return merged[0].to(out.dtype), merged[1]

    @stateful
    def flush(self) -> None:
        """As `KVStore.flush`; every rank calls it at the same step."""
        if self._new[0] > 1:
            self._new = (0, 0, 0)
        self._flush(at_step=False)

    def _flush(self, *, at_step: bool) -> None:
        """`KVStore._flush` for the whole context: rows of all ranks join the middle together."""
        selector = self.selector
        if selector is None or not self.lengths or (selector.waits and not at_step):
            return
        due, before = self.budget.rows_in_lists(self.length), self.middles[0]
        if due <= before or (before == 0 and due < selector.least_rows):
            return
        self.middles = [due]
        if not self.own_length:
            selector.learn_together(None, due, self._n_kv)
            return
        first, n_sink = self._tokens[0], self.own.budget.n_sink
        rows = self.budget.n_sink + due - first - n_sink
        self.own.take_in(min(max(rows, 0), max(0, self.own_length - n_sink)))
        selector.learn_together(self.own.middle, due, self._n_kv)
        if self.own.middles[0]:
            self.own.reindex()

    @stateful
    def truncate(self, n_dropped: int | Sequence[int]) -> None:
        """Forget nothing or everything. Raises ValueError for less."""
        dropped = sum(numbers_of(n_dropped, self.batch))
        if dropped == 0:
            return
        self.check_left([self.length - dropped])
        self.reset()

    def check_left(self, left: list[int]) -> None:
        """ValueError if `truncate` cannot leave so many tokens."""
        if left and left[0] not in (0, self.length):
            raise ValueError(
                "a split context must keep its tokens or lose all of them; got a truncation of "
                f"{self.length - left[0]} of {self.length}"
            )

    def reset(self) -> None:
        """Forget all tokens, and what was learned from them."""
        selector = self.selector
        if selector is not None:
            fresh = SaapSelector(selector.layer, selector.method, selector.trained)
            self.selector = SplitSelector(fresh, self.group)
        self.own, self.lengths, self.middles, self._new = None, [], [], (0, 0, 0)
        self.rest = SplitRest(self.group)
        if self._parts is None:  # shared out evenly, as the tokens that come first then
            self.begins = None

    @stateful
    def select_sequences(self, sequences: Sequence[int] | Tensor) -> None:
        """Nothing changes. Raises ValueError for another number of sequences than one."""
        if list(map(int, sequences)) != [0][: self.batch]:
            raise ValueError(
                f"a split context must stay one sequence; got sequences {list(sequences)}"
            )

    def resting(self):
        """Drafts are refused: ValueError."""
        raise ValueError("a split context must not be drafted on; got drafts of tokens")


def _nothing(q: Tensor) -> OutAndLse:
    lse = torch.full(q.shape[:-1], -torch.inf, dtype=torch.float32, device=q.device)
    return torch.zeros_like(q), lse
