"""The interface between the KV store and whatever chooses the rows that a query visits."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from saap.kernels.attention.api import PreparedRanges
from saap.kernels.attention.int8_rows import dequantize_rows, head_dim
from saap.kernels.rest import Scored

from .budget import BOUNDS, Budget

Ranges = tuple[Int[Tensor, "n H R"], Int[Tensor, "n H R"]]


@dataclass(frozen=True)
class LayerInfo:
    """What a selector may know of the attention layer that it works for.

    `sm_scale`: factor of its scores. `number`: its place in the model, from 0. `softcap`: the
    bound of its scores, None for none. `inv_freq`: radians per token by which RoPE turns each pair
    of dimensions, None for a layer without RoPE. `interleaved`: whether dimension 2i pairs with
    2i + 1 rather than i with i + D / 2. `sinks`: learned logits that take their part of each query
    head's softmax, as gpt-oss has them. `device`: where the selector keeps its tensors.
    """

    sm_scale: float
    number: int = 0
    softcap: float | None = None
    inv_freq: Float[Tensor, " pairs"] | None = None
    interleaved: bool = False
    device: torch.device | str = "cpu"
    sinks: Float[Tensor, " Hq"] | None = None

    def beside_middle(self, local_lse: Float[Tensor, "n Hq"]) -> Float[Tensor, "n Hq"]:
        """Log-sum-exp of all that takes its part of the softmax beside the middle, of
        `local_lse`, that of the scores with the first and the most recent tokens."""
        if self.sinks is None:
            return local_lse
        return torch.logaddexp(local_lse, self.sinks.float())


@dataclass(frozen=True)
class Middle:
    """The indexed rows of a store: all between the sinks and the tail.

    `k [B, Hkv, capacity, width]`, `lists` and `tokens [B, Hkv, capacity]` are views whose row 0 is
    the first of the middle. Keys have RoPE on them and are in the dtype of the store; `keys_of`
    gives floats. The first `n_rows[b]` rows of sequence b are in use, in the order of their lists
    and in time order within a list. `first_row`: how many rows of the store come before, the
    sinks. `reader(b, first, last)`: reads these keys `[Hkv, n, width]` of the store, if they must
    not be read from `k`; else None.
    """

    k: Shaped[Tensor, "B Hkv capacity width"]
    lists: Int[Tensor, "B Hkv capacity"]
    tokens: Int[Tensor, "B Hkv capacity"]
    n_rows: list[int]
    first_row: int
    reader: Callable[[int, int, int], Tensor] | None = None

    @property
    def n_kv(self) -> int:
        return self.k.shape[1]

    @property
    def dim(self) -> int:
        return head_dim(self.k)

    @property
    def device(self) -> torch.device:
        return self.k.device

    def keys_of(self, b: int, first: int = 0, last: int | None = None) -> Float[Tensor, "Hkv n D"]:
        """The rows of sequence b that are in use, or those from `first` to before `last`."""
        last = self.n_rows[b] if last is None else last
        if self.reader is None:
            return _as_floats(self.k[b, :, first:last])
        return _as_floats(self.reader(b, self.first_row + first, self.first_row + last))

    def parts_of(self, b: int, size: int) -> Iterator[Float[Tensor, "Hkv n D"]]:
        """The rows of sequence b that are in use, `size` at a time."""
        for first in range(0, self.n_rows[b], size):
            yield self.keys_of(b, first, min(first + size, self.n_rows[b]))


def _as_floats(keys: Shaped[Tensor, "Hkv n width"]) -> Float[Tensor, "Hkv n D"]:
    return dequantize_rows(keys) if keys.dtype == torch.int8 else keys


@dataclass(frozen=True)
class Query:
    """Queries `[n, Hq, D]`, with RoPE as attention sees them, and with RoPE taken off.

    There is one for each sequence of the store, or any number for a store of one sequence.
    `positions`: the position of each query's token, or one for all. `local_lse(sm_scale,
    softcap)`: the log-sum-exp `[n, Hq]`, float32, of the scores with sinks and tail; None if it
    is not known. `local(sm_scale, softcap)`: attention over these, where it is prepared for steps
    like this.
    """

    q_rope: Float[Tensor, "n Hq D"]
    q_derope: Float[Tensor, "n Hq D"]
    positions: int | list[int] | Int[Tensor, " n"]
    impl: str | None = None
    local_lse: Callable[[float, float | None], Tensor] | None = None
    local: Callable[[float, float | None], PreparedRanges | None] | None = None

    def beside_middle(self, layer: LayerInfo) -> Float[Tensor, "n Hq"] | None:
        """As that of the layer, which says how much of a head's attention is left for the middle;
        None if it is not known."""
        if self.local_lse is None:
            return None
        return layer.beside_middle(self.local_lse(layer.sm_scale, layer.softcap))


@dataclass
class RangeBuffer:
    """Tensors `starts, lengths` int32 that a store keeps from step to step for its ranges."""

    n_local: int
    starts: Tensor | None = None
    lengths: Tensor | None = None
    taken: Ranges | None = None

    def take(self, n: int, heads: int, most: int, device: torch.device) -> Ranges:
        """Views `[n, heads, most]` behind the columns for sinks and tail, to be written to.

        The same objects as long as the shape is the same.
        """
        shape = (n, heads, self.n_local + most)
        if self.taken is None or self.starts.shape != shape:
            self.starts = torch.zeros(shape, dtype=torch.int32, device=device)
            self.lengths = torch.zeros_like(self.starts)
            self.taken = self.starts[..., self.n_local :], self.lengths[..., self.n_local :]
        return self.taken

    def holds(self, starts: Tensor) -> bool:
        """Whether `starts` is, or begins as, what `take` gave out."""
        return self.taken is not None and starts.data_ptr() == self.taken[0].data_ptr()

    @property
    def nbytes(self) -> int:
        return 0 if self.starts is None else self.starts.nbytes + self.lengths.nbytes


class Selector(ABC):
    """Chooses rows of the middle of one layer's store, for all its sequences.

    A store calls `begin` with its first tokens, `observe` with the queries of every step except
    drafts, `assign` for every new key, `update` whenever rows joined or left the middle, and
    `select` for each decode step.
    """

    follows: bool = True
    """Whether tokens that come after the first step can join the middle. Where they cannot, they
    stay in the tail, which every step visits: a step costs more the longer the answer is."""

    waits: bool = False
    """Whether rows join the middle at a decode step only, so that what is learned from a prompt
    does not depend on the chunks in which it came."""

    least_rows: int = 0
    """How many rows the first that join the middle have to be."""

    assigns_by: Literal["derope", "rope"] | None = None
    """Which keys `assign` gets; None: rows have no lists and stay in time order."""

    visits_best: bool = False
    """Whether it visits the rows with the largest scores, one by one, of rows in time order: only
    then can be told what the others hold (`saap.kernels.rest`)."""

    reads_derope: bool = True
    """Whether it looks at keys or queries with RoPE taken off. Where it does not, it may be given
    them as they are."""

    left_out: Scored | None = None
    """What the latest `select` found out of rows that it scored and did not choose, where it
    `visits_best` and the rest is to be estimated; None if nothing is known."""

    n_kv: int | None = None
    """KV heads that it was made for; None for any number."""

    n_assigned: int = 1
    """How many lists `assign` tells apart."""

    nbytes: int = 0
    """Bytes that choosing reads in one step of this layer: routers, centroids, codes."""

    bounds: ClassVar[tuple[str, ...]] = ("nprobe", "max_tokens", "top_p")
    """The bounds of a budget that this selector can follow."""

    @property
    def ready(self) -> bool:
        """Whether it can choose already; until then every row stays in the tail."""
        return True

    @property
    def keeps_order(self) -> bool:
        """Whether rows stay in time order; else lists or `update` say in which order they lie."""
        return self.assigns_by is None

    def check_budget(self, budget: Budget) -> None:
        """Raise ValueError, naming the bound, for a budget that this selector cannot follow."""
        for bound in BOUNDS:
            value = getattr(budget, bound)
            if value is not None and bound not in self.bounds:
                raise ValueError(
                    f"this method follows {' and '.join(self.bounds)}; got {bound}={value}"
                )

    def begin(
        self, k_derope: Float[Tensor, "B Hkv T D"], mask: Bool[Tensor, "B T"] | None
    ) -> None:
        """See the first tokens of an empty store; `mask` is False where there is padding."""

    def observe(self, q_rope: Float[Tensor, "B Hq T D"], n_new: list[int]) -> None:
        """See queries of new tokens; those of sequence b are its last `n_new[b]`."""

    def forget(self, sequence: int) -> None:
        """This sequence has no tokens any more: what was learned from it goes, too."""

    def reset(self) -> None:
        """No sequence has tokens any more; each was forgotten."""

    def select_sequences(self, chosen: Int[Tensor, " B2"]) -> None:
        """Sequence i becomes what sequence `chosen[i]` was; `update` follows."""

    def assign(self, keys: Float[Tensor, "B Hkv T D"]) -> Int[Tensor, "B Hkv T"]:
        """The list of each key, int32."""
        raise AssertionError(f"{type(self).__name__} assigns no lists")

    def update(self, middle: Middle) -> list[Int[Tensor, "Hkv n_rows"]] | None:
        """Take note of the rows of the middle.

        Returns None, or for each sequence the order in which the store shall keep its rows;
        reordering them does not call `update` again.
        """

    def state(self) -> dict[str, Tensor]:
        """The part of this selector that is saved with the rows."""
        return {}

    def restore(self, state: dict[str, Tensor], middle: Middle) -> None:
        """Take note of saved rows and what `state` gave. ValueError where they do not fit."""
        self.update(middle)

    def state_before(self, batch: int, n_kv: int, dim: int) -> dict[str, Tensor]:
        """What is saved while no row is in the middle yet, so that it learns from these tokens."""
        return {}

    def restore_before(self, state: dict[str, Tensor], batch: int, n_kv: int, dim: int) -> None:
        """Take note of what `state_before` gave. ValueError where it does not fit."""

    def again(
        self, local: PreparedRanges | None
    ) -> Callable[[Float[Tensor, "n Hq D"]], Ranges] | None:
        """A function that repeats the last `select` for new queries, RoPE left on.

        It writes to the same tensors, and is valid until rows join or leave the middle.
        `local`: attention over sinks and tail, if `select` asked for it. Returns None if only
        `select` can do it.
        """
        return None

    @abstractmethod
    def select(self, query: Query, middle: Middle, budget: Budget, room: RangeBuffer) -> Ranges:
        """`starts, lengths` int32 `[n, H, R]`: rows to visit, counted from the first of the store.

        `H` is Hkv for `budget.share="group"`, else Hq. Ranges of one query and head do not
        overlap. They may be written to what `room.take` gives.
        """


def check_ranges(starts: Tensor, lengths: Tensor, n_rows: list[int], first_row: int) -> None:
    """Raise ValueError for ranges that overlap or leave the middle: mistakes of a selector.

    A store does this at every step if `KVStore.debug` is set; attention over overlapping
    ranges would count rows twice, without an error.
    """
    starts, lengths = starts.long().cpu(), lengths.long().cpu()
    ends = starts + lengths
    last = torch.tensor(n_rows).expand(len(starts))[:, None, None] + first_row
    wrong = (lengths < 0) | ((lengths > 0) & ((starts < first_row) | (ends > last)))
    if bool(wrong.any()):
        n, head, place = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"a selector's ranges must be rows {first_row} to {int(last[n, 0, 0]) - 1}; got "
            f"start {int(starts[n, head, place])} and length {int(lengths[n, head, place])} for "
            f"query {n}, head {head}"
        )
    order = torch.where(lengths > 0, starts, torch.iinfo(torch.int64).max).argsort(-1)
    begins = starts.gather(-1, order)
    stops = ends.gather(-1, order)
    used = lengths.gather(-1, order) > 0
    overlap = (begins[..., 1:] < stops[..., :-1]) & used[..., 1:]
    if bool(overlap.any()):
        n, head, place = overlap.nonzero()[0].tolist()
        raise ValueError(
            f"a selector's ranges must not overlap; got row {int(begins[n, head, place + 1])} "
            f"twice for query {n}, head {head}"
        )
