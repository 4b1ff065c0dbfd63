"""The KV store of one layer: `sinks | middle by list | tail in time order`, grown in place.

Rows are sorted into lists in the cache itself, so keys and values are held once. This is possible
because attention does not depend on the order of rows. New tokens go to the tail; those that have
left the window join the middle, some at a time (Saap, arXiv 2502.08246, section 3.3).
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from saap.budget import Budget
from saap.index.rows import BucketRows
from saap.kernels.attention.int8_rows import head_dim, stored_as
from saap.kernels.attention.validate import check_scalars
from saap.kernels.rest import Moments, PreparedRest
from saap.notebook import line, size, table
from saap.prefill import PrefillBudget
from saap.selector import Middle, Ranges, Selector
from saap.stateful import stateful

from .checks import check_append, check_fits, check_kv_dtype, check_query, numbers_of
from .chunk_attention import ChunkAttention
from .chunks import OutAndLse
from .decode_steps import DecodeSteps
from .file_rows import FileRows
from .memory import held_bytes
from .middle_rows import MiddleRows
from .ranges import AllRanges
from .rest import RestOfRows
from .sparse_chunks import RowsRead


class KVStore:
    """Keys, values and lists of one layer, for B sequences that grow together.

    Sequences may have different lengths: padding is never stored, so a sequence has the same rows
    and the same results alone and in a batch. Not differentiable; not for several threads.

    Args:
        selector: what chooses rows, made for this store alone; None keeps the layer dense.
        budget: what a step visits. `n_sink`, `window` and `flush_every` also lay out the rows.
        capacity: tokens per sequence to make room for at the first append.
        kv_dtype: dtype that keys and values are stored in, None for their own. With a float32
            model, `torch.bfloat16` and `torch.float16` take half the bytes, and `torch.int8` with
            a scale for each row little more than a quarter. Attention computes in the dtype of
            the queries.
        steered: rows join the middle only when `take_in` says so: this store holds a part of a
            context, and when rows are due depends on the whole context (`saap.distributed`).
        prefill: what a step of several tokens visits; None: everything.
        rows: where keys and values lie; None: new rows in memory. `FileRows` takes one sequence,
            and a selector that leaves rows in time order.

    Raises ValueError for a budget that the selector cannot follow, and for a selector that orders
    rows if these lie in a file.
    """

    debug: ClassVar[bool] = os.environ.get("SAAP_DEBUG") == "1"
    """Stores made while this is set check at every step that the selector's ranges neither overlap
    nor leave the middle."""

    def __init__(
        self,
        selector: Selector | None,
        budget: Budget,
        *,
        capacity: int = 0,
        kv_dtype: torch.dtype | None = None,
        steered: bool = False,
        prefill: PrefillBudget | None = None,
        rows: BucketRows | FileRows | None = None,
    ):
        if selector is not None:
            selector.check_budget(budget)
        check_kv_dtype(kv_dtype)
        self.selector, self.budget, self.capacity = selector, budget, capacity
        self.kv_dtype = kv_dtype
        self.in_file = isinstance(rows, FileRows)
        if self.in_file and selector is not None and not selector.keeps_order:
            raise ValueError(
                "rows in a file need a method that leaves them in time order, saap or dense; got "
                f"{type(selector).__name__}"
            )
        self.rows = rows or BucketRows(("k", "v"))
        self._begin()
        self._resting = False  # whether rows stay where they are, whatever comes
        self._steered = steered
        self._chunks = ChunkAttention(prefill, budget)

    def _begin(self) -> None:
        """There are no tokens."""
        self.lengths: list[int] = []
        self._lists = MiddleRows(self.rows, self.selector, self.budget)
        self._new: list[int] = []  # tokens of the last append, by sequence
        self._new_dtype: torch.dtype | None = None  # as they were given
        self._length_new = 0
        self._stale = False  # whether the selector does not know the middle
        self._steps = DecodeSteps(
            self._lists, self.selector, self.budget.n_sink, self.kv_dtype, checked=self.debug
        )

    @stateful
    def reset(self) -> None:
        """Forget all tokens, what was learned from them, and the batch. Memory is freed."""
        if self.selector is not None:
            if any(self.middles):
                self._lists.counts = [0] * self.batch
                self.selector.update(self.middle)
            for b in range(self.batch):
                self.selector.forget(b)
            self.selector.reset()
        self.rows.clear()
        self._begin()

    @property
    def prefill(self) -> PrefillBudget | None:
        """What a step of several tokens visits; None: everything."""
        return self._chunks.prefill

    @prefill.setter
    def prefill(self, prefill: PrefillBudget | None) -> None:
        self._chunks.prefill = prefill

    @property
    def rows_read(self) -> RowsRead:
        """Rows that steps of several tokens have read."""
        return self._chunks.rows_read

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths, default=0)

    @property
    def middles(self) -> list[int]:
        """Rows of each sequence that a selector chooses from."""
        return self._lists.counts

    @property
    def middle(self) -> Middle:
        """The rows that a selector chooses from."""
        return self._lists.seen

    @property
    def k(self) -> Shaped[Tensor, "B Hkv capacity width"]:
        """Keys as they are stored, in `kv_dtype`: D wide, or as wide as `quantize_rows` says."""
        return self.rows.vectors["k"]

    @property
    def v(self) -> Shaped[Tensor, "B Hkv capacity width"]:
        return self.rows.vectors["v"]

    @property
    def heads(self) -> tuple[int, int]:
        """KV heads, and dimensions of a head; only after the first append."""
        return self.k.shape[1], head_dim(self.k)

    @property
    def in_time_order(self) -> bool:
        """Whether row i of a sequence is that of its token i, and stays so."""
        return self.selector is None or self.selector.keeps_order

    @property
    def nbytes(self) -> int:
        """Bytes held: keys, values, each row's numbers of list and token, ranges, pending keys,
        and what the selector keeps (codes, pages, graphs)."""
        own = list(self.rows.vectors.values())
        return (
            self.rows.nbytes + self._lists.nbytes + self._steps.nbytes
            + held_bytes(self.selector, besides=own)
        )  # fmt: skip

    def _facts(self) -> list[tuple[str, object]]:
        held = ", ".join(f"{n:,}" for n in self.lengths[:4]) + (", ..." if self.batch > 4 else "")
        return [
            ("tokens", held or 0),
            ("rows to choose from", ", ".join(f"{n:,}" for n in self.middles[:4]) or 0),
            ("selector", "none" if self.selector is None else type(self.selector).__name__),
            ("last step visited", f"{self.visited_share:.1%}"),
            ("memory", size(self.nbytes)),
        ]

    def __repr__(self) -> str:
        return line("KVStore", self._facts())

    def _repr_html_(self) -> str:
        return table("KVStore", self._facts())

    @property
    def visited_rows(self) -> float:
        """Rows that the last step visited per head; averaged over heads and sequences."""
        return self._steps.ranges.visited_rows(self.lengths)

    @property
    def visited_share(self) -> float:
        """Share of all rows that the last step visited; averaged over heads and sequences."""
        return self._steps.ranges.visited_share(self.lengths)

    @property
    def bytes_read(self) -> float:
        """Bytes that the last step read per sequence: rows, counted once for each head that reads
        them, and what was read to choose rows and to estimate the others.

        A choice that weighs heads reads sinks and tail twice. They count once, because the second
        time they come from the processor's cache.
        """
        return self._steps.bytes_read(self.lengths)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of one KV head: of its key and its value, once if these are the same."""
        return self._steps.row_bytes

    @property
    def rest(self) -> RestOfRows:
        """How the rows of the middle are spread, from which those that steps leave out are
        estimated."""
        return self._steps.rest

    @property
    def estimated(self) -> Moments | None:
        """What the last step estimated the rows from that it left out; None if it did not."""
        return self._steps.estimated

    @stateful
    def reserve(self, n: int, like: Float[Tensor, "B Hkv T D"] | None = None) -> None:
        """Make room for n tokens per sequence now. After a MemoryError nothing has changed."""
        if like is None and not self.rows.vectors:
            raise ValueError("reserve needs like=keys before the first append; got none")
        if n > self.rows.capacity:
            self._steps.changed()
        like = self.k if like is None else self._as_stored(like[:, :, :0])
        self.rows.reserve(n, like, self.length)

    @stateful
    def append(
        self,
        k_rope: Float[Tensor, "B Hkv T D"],
        v: Float[Tensor, "B Hkv T D"],
        k_derope: Float[Tensor, "B Hkv T D"],
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> None:
        """Add T tokens to each sequence. Where `mask` is False there is padding, on the left,
        which is not stored.

        Raises ValueError for shapes or a batch that do not fit, and MemoryError when there is no
        memory to grow. In both cases nothing has changed.
        """
        held = self.k if self.rows.vectors else None
        n_kv = None if self.selector is None else self.selector.n_kv
        check_append(
            k_rope, v, k_derope, mask,
            lengths=self.lengths, held=held, n_kv=n_kv, kv_dtype=self.kv_dtype,
        )  # fmt: skip
        batch, _, length, _ = k_rope.shape
        new = [length] * batch if mask is None else mask.sum(1).tolist()
        self._steps.changed()
        self.flush()
        lengths = self.lengths or [0] * batch
        longest = max(a + b for a, b in zip(lengths, new, strict=True))
        if longest > self.rows.capacity:
            self._let_go()
        like = self._as_stored(k_rope[:, :, :0])
        self.rows.reserve(max(longest, self.capacity, 1), like, self.length)  # 1: all padding
        if self.selector is not None and not self.length:
            self.selector.begin(k_derope, mask)
        if not self.lengths:
            self.lengths = lengths
            self._lists.begin(batch)
        lists = self._lists.of_new(k_rope, k_derope, new, self.lengths)
        if len(set(self.lengths)) == 1 and new == [length] * batch:
            written = self._as_stored(k_rope), self._as_stored(v)
            self.rows.write(slice(None), self.lengths[0], written, lists)
        else:
            for b, n in enumerate(new):
                own = lists if isinstance(lists, int) else lists[b, :, length - n :]
                ends = (self._as_stored(t[b, :, length - n :]) for t in (k_rope, v))
                self.rows.write(b, self.lengths[b], tuple(ends), own)
        self.lengths = [a + b for a, b in zip(self.lengths, new, strict=True)]
        self._new, self._length_new, self._new_dtype = new, length, k_rope.dtype

    def _as_stored(self, rows: Tensor) -> Tensor:
        """Keys or values as this store holds them."""
        return stored_as(rows, self.kv_dtype)

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
        """Attention of the T tokens appended last: `out [B, Hq, T, D]`, `lse [B, Hq, T]` float32.

        If T is 1, the token visits sinks, tail and the rows that the budget allows. More tokens
        are exact dense attention, unless the store has a `prefill` budget. `budget`: bounds for
        this call in place of the store's own. `impl`: as for `saap.attend_ranges`; it holds for
        choosing rows, too. Where there is padding, `out` is 0 and `lse` is -inf. Raises
        ValueError when T is not the number of tokens appended last.
        """
        new = self._length_new if self._new else 0
        budget = self._allowed(budget)
        n_kv, dim = self.heads if new else (0, 0)
        check_query(q_rope, q_derope, batch=self.batch, n_new=new, n_kv=n_kv, dim=dim)
        sm_scale = q_rope.shape[-1] ** -0.5 if sm_scale is None else sm_scale
        check_scalars(sm_scale, softcap)  # nothing is learned from queries that are refused
        if self.selector is not None and not (self._resting and q_rope.shape[2] == 1):
            self.selector.observe(q_rope, self._new)
        if q_rope.shape[2] > 1:
            found = self._chunks.attend(
                q_rope, self.k, self.v, self.lengths, self._new, sm_scale=sm_scale, softcap=softcap
            )
            if self.in_file:
                self.rows.unmap()
            return found
        self._flush(at_step=True)
        out, lse, add = self._steps.attend(
            q_rope, q_derope, self.lengths, budget, sm_scale=sm_scale, softcap=softcap, impl=impl
        )
        if impl is None and budget is self.budget and min(self._new) > 0:
            self._steps.prepare(
                q_rope, self.lengths, budget, self._new_dtype, add,
                self._terms(sm_scale, softcap), resting=self._resting,
            )  # fmt: skip
        return out.unsqueeze(2), lse.unsqueeze(2)

    @stateful
    def attend_visible(
        self,
        q_rope: Float[Tensor, "B Hq T D"],
        visible: Bool[Tensor, "B T slots"],
        tokens: Bool[Tensor, "B slots"],
        *,
        sm_scale: float | None = None,
        softcap: float | None = None,
    ) -> OutAndLse:
        """As `attend`, exact, where tokens see other ones than those up to themselves.

        `tokens`: which slots, of all so far, hold tokens of the store, in time order; the others
        are padding on the left. `visible`: the slots that each of the T latest sees. Only for a
        store `in_time_order`.
        """
        sm_scale = q_rope.shape[-1] ** -0.5 if sm_scale is None else sm_scale
        if self.selector is not None:
            self.selector.observe(q_rope, [min(n, q_rope.shape[2]) for n in self._new])
        found = self._chunks.attend_visible(
            q_rope, self.k, self.v, visible, tokens, sm_scale=sm_scale, softcap=softcap
        )
        if self.in_file:
            self.rows.unmap()
        return found

    def step(
        self,
        k_rope: Float[Tensor, "B Hkv T D"],
        v: Float[Tensor, "B Hkv T D"],
        k_derope: Float[Tensor, "B Hkv T D"],
        q_rope: Float[Tensor, "B Hq T D"],
        q_derope: Float[Tensor, "B Hq T D"],
        *,
        sm_scale: float | None = None,
        softcap: float | None = None,
    ) -> OutAndLse:
        """`append` T tokens to each sequence, and `attend` from them: what a decoder needs.

        For one token this is faster than the two calls, if the step is like the one before, as
        most are. Raises what they raise.
        """
        found = None
        if q_rope.shape[2] == 1:
            found = self.again(q_rope, k_rope, v, sm_scale=sm_scale, softcap=softcap)
        if found is None:
            self.append(k_rope, v, k_derope)
            found = self.attend(q_rope, q_derope, sm_scale=sm_scale, softcap=softcap)
        return found

    @stateful
    def again(
        self,
        q_rope: Float[Tensor, "B Hq 1 D"],
        k_rope: Float[Tensor, "B Hkv 1 D"],
        v: Float[Tensor, "B Hkv 1 D"],
        *,
        sm_scale: float | None = None,
        softcap: float | None = None,
    ) -> OutAndLse | None:
        """`append` and `attend` of one token for each sequence, if this step is like the last.

        Gives the same result, and spends only a fraction of the time outside the kernels. Returns
        None if the step is not like the last; then nothing has been done: call both.
        """
        sm_scale = q_rope.shape[-1] ** -0.5 if sm_scale is None else sm_scale
        step = self._steps.next_for(q_rope, k_rope, v, self._terms(sm_scale, softcap))
        if step is None:
            return None
        if self.kv_dtype is not None:
            check_fits(k_rope, v, self.kv_dtype)
        self._steps.changed()  # where this is broken off, the next step is a general one
        if self.selector is not None and not self._resting:
            self.selector.observe(q_rope, self._new)
        found = step(q_rope, k_rope, v, self.lengths)
        self.lengths = [n + 1 for n in self.lengths]
        self._steps.keep(step)
        return found

    def _terms(self, sm_scale: float, softcap: float | None) -> dict[str, object]:
        """What two steps must have in common to be alike, besides their tensors."""
        return {
            "sm_scale": sm_scale, "softcap": softcap, "budget": self.budget,
            "resting": self._resting,
        }  # fmt: skip

    def adds_rest(
        self, budget: Budget, lengths: Tensor, sm_scale: float, softcap: float | None
    ) -> PreparedRest | None:
        """Adds the estimated rest to attention over ranges of these `lengths [n, H, R]`; None if
        nothing is estimated. The first `LOCAL` ranges are sinks and tail."""
        return self._steps.adds_rest(budget, self.lengths, lengths, sm_scale, softcap)

    @stateful
    def select(
        self,
        q_rope: Float[Tensor, "n Hq D"],
        q_derope: Float[Tensor, "n Hq D"],
        budget: Budget | None = None,
        *,
        positions: Int[Tensor, " n"] | None = None,
        local_lse: Float[Tensor, "n Hq"] | None = None,
        impl: str | None = None,
    ) -> Ranges:
        """`starts, lengths` int32 `[n, H, R]` of all rows that a decode step visits.

        There is one query for each sequence, that of its newest token; or, for a store of one
        sequence, any number of queries, those of the tokens at `positions`. `H` is Hkv, or Hq
        for `share="head"`. `local_lse`: log-sum-exp of the scores with rows that attention visits
        in any case, if these are not the store's sinks and tail.
        """
        budget = self._allowed(budget)
        self._flush(at_step=True)
        return self._steps.select(
            q_rope, q_derope, self.lengths, budget, positions=positions, local_lse=local_lse,
            impl=impl,
        )  # fmt: skip

    def _allowed(self, budget: Budget | None) -> Budget:
        """The store's own if none is given; ValueError for one that the selector cannot follow."""
        if budget is None or budget is self.budget:
            return self.budget
        if self.selector is not None:
            self.selector.check_budget(budget)
        return budget

    def with_local(self, chosen: Ranges | None, dense_below: int, n_queries: int) -> AllRanges:
        """All that a step visits: the chosen ranges, sinks and tail; all rows if `chosen` is None.

        Sequences of at most `dense_below` tokens are visited whole.
        """
        return self._steps.with_local(chosen, self.lengths, dense_below, n_queries)

    def local_lse(
        self, q_rope: Float[Tensor, "n Hq D"], sm_scale: float, softcap: float | None
    ) -> Float[Tensor, "n Hq"]:
        """Log-sum-exp, float32, of the scores with sinks and tail, which a step visits in any
        case; queries are as those of `select`."""
        return self._steps.local_lse(q_rope, self.lengths, sm_scale, softcap)

    @stateful
    def flush(self) -> None:
        """Put the rows that are due into the middle. Afterwards the places of rows depend on the
        tokens only, not on how they came.

        Ends a step of several tokens: `attend` can no longer be called for these.
        """
        if self._length_new > 1:
            self._new = []
        self._flush(at_step=False)

    @stateful
    def chooses(self) -> bool:
        """Whether a step of one token would leave out rows now; flushes as that step would."""
        self._flush(at_step=True)
        return self._steps.chooses(self.lengths, self.budget)

    def _let_go(self) -> None:
        """Forget everything that refers to rows whose place will change."""
        self._steps.moved()
        self._lists.let_go()

    @contextmanager
    def resting(self) -> Iterator[None]:
        """While open, no row moves and the selector learns nothing: new tokens stay in the tail.

        For drafts, which are forgotten again: a flush that counted them would have to be undone
        with them, and that moves all rows of the middle.
        """
        self.flush()
        self._flush(at_step=True)
        self._resting = True
        try:
            yield
        finally:
            self._resting = False

    def restore(
        self,
        lengths: list[int],
        middles: list[int],
        state: dict[str, Tensor],
        rest: dict[str, Tensor],
    ) -> None:
        """Fill an empty store with the saved rows that `rows` holds already.

        `state`, `rest`: what was saved of the selector and of `RestOfRows`.
        """
        self.lengths = lengths
        self._lists.restore(middles)
        if not any(middles):
            self._restore_before(state)
            return
        if self._lists.reordered:  # in an order that the selector has to ask for again
            self.reindex()
        else:
            self.selector.restore(state, self.middle)
        self.rest.restore(rest, middles)

    def _restore_before(self, state: dict[str, Tensor]) -> None:
        """Where nothing was in the middle."""
        if self.selector is not None:
            self.selector.restore_before(state, self.batch, *self.heads)

    @stateful
    def settle(self) -> None:
        """`flush`, and give every token the number of its list, so that the store can be saved."""
        self.flush()
        self._flush(at_step=True)
        self._lists.assign(self.lengths)

    def _flush(self, *, at_step: bool) -> None:
        """`at_step`: for a decode step, at which a selector that waits is built."""
        if self._resting or self._steered:
            return
        due = self._lists.overdue(self.lengths, at_step=at_step)
        if any(due):
            self._lists.insert(due, self.lengths)
        if any(due) or self._stale:
            self.reindex()

    def take_in(self, n_rows: int) -> None:
        """Let the middle of a steered store of one sequence hold `n_rows`; call `reindex` next."""
        self._lists.insert([max(0, n_rows - self.middles[0])], self.lengths)

    def reindex(self) -> None:
        """Tell the selector that the middle has changed, and put rows in the order it asks for."""
        self._steps.reindexed()
        self._stale = True  # until it is done: where it is broken off, the next step begins anew
        self._lists.reindex()
        self._stale = False

    @stateful
    def truncate(self, n_dropped: int | Sequence[int] | Int[Tensor, " B"]) -> None:
        """Forget the last tokens of each sequence; the last ones left are the window then.

        `n_dropped`: how many, of all sequences or of each.

        Raises ValueError if some sinks would go from a sequence that is long enough to have rows
        in the middle: of such a sequence forget all tokens, or leave the sinks whole.
        """
        dropped = numbers_of(n_dropped, self.batch)
        left = [n - d for n, d in zip(self.lengths, dropped, strict=True)]
        self.check_left(left)
        if not any(dropped):
            return
        self._steps.changed()
        moved = self._lists.truncate(self.lengths, left)
        self.rest.truncate(self.middles)
        self.lengths, self._new = left, []
        if moved:
            self.reindex()
        if self.selector is not None:
            for b, n in enumerate(left):
                if n == 0:
                    self.selector.forget(b)
        if not any(left):
            self._steps.emptied()
            if self.selector is not None:
                self.selector.reset()

    def check_left(self, left: list[int]) -> None:
        """ValueError if `truncate` cannot leave so many tokens of each sequence."""
        for n, after in zip(self.lengths, left, strict=True):
            cuts_sinks = self._lists.due(n) and 0 < after < self.budget.n_sink
            if after > n or after < 0 or cuts_sinks:
                raise ValueError(
                    f"truncation must leave 0 or {min(n, self.budget.n_sink)} to {n} tokens, "
                    f"because the first {self.budget.n_sink} are sinks; got {after} of {n}"
                )

    @stateful
    def select_sequences(self, sequences: Sequence[int] | Tensor) -> None:
        """Sequence i becomes what `sequences[i]` was: reorders, repeats or drops sequences.

        If none is left, the store is as new.
        """
        chosen = torch.as_tensor(sequences, device="cpu")
        if not self.batch:
            return
        if not len(chosen):
            self.reset()
            return
        wrong = [i for i in chosen.tolist() if not 0 <= i < self.batch]
        if wrong:
            raise ValueError(f"a sequence must be in 0..{self.batch - 1}; got {wrong[0]}")
        self._lists.assign(self.lengths)
        self._let_go()
        self.rows.select(chosen, self.length)
        self.rest.select_sequences(chosen.tolist())
        self._take_sequences(chosen)

    def _take_sequences(self, chosen: Int[Tensor, " B"]) -> None:
        """Of rows that have been chosen already."""
        for name in ("lengths", "_new"):
            held = getattr(self, name)
            setattr(self, name, [held[i] for i in chosen.tolist()] if held else [])
        self._lists.select_sequences(chosen)
        if any(self.middles):
            self.reindex()

    def as_index(self, sequence: int = 0):
        """A FAISS index over the indexed rows of one sequence; its `search` finds top-k keys.

        A read-only view (`saap.kv.index_view.StoreIndex`). Raises ValueError for a selector that
        keeps no lists.
        """
        from .index_view import StoreIndex

        return StoreIndex(self, sequence)
