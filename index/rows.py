"""Rows in the order of their lists: preallocated buffers, and how rows move in them.

The KV store of a layer and `AsymmetricIVF` share this implementation.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from . import huge_pages

GROWTH = 8  # a full buffer grows by an eighth, so that little memory lies idle
SPARE_ROWS = 64
MOVED_AT_ONCE = 1024


class BucketRows:
    """Vectors `[B, H, capacity, D]` by name, and for each row its list and its token.

    `lists [B, H, capacity]` int32 is -1 while a row has no list yet; `tokens [B, H, capacity]`
    says which vector lies in the row. Every head keeps its own order of rows. Only the
    owner of the buffers knows how many rows are in use; the rows after those hold nothing.

    Args:
        names: names of the vectors, such as `("k", "v")`; all have one shape and dtype.
        token_dtype: int32 for tokens numbered from 0, int64 for ids that a caller chooses.
        same: names whose vectors are those of another name, which are held once: `{"v": "k"}`.
    """

    def __init__(
        self,
        names: Sequence[str] = ("k", "v"),
        token_dtype: torch.dtype = torch.int32,
        same: Mapping[str, str] | None = None,
    ):
        self.names, self.token_dtype, self.same = tuple(names), token_dtype, dict(same or {})
        self.vectors: dict[str, Tensor] = {}
        self.lists: Tensor | None = None
        self.tokens: Tensor | None = None
        self._plain = True  # row i holds token i, in list 0, and so do rows that are not used yet

    @classmethod
    def over(
        cls,
        vectors: dict[str, Tensor],
        lists: Int[Tensor, "B H capacity"],
        tokens: Int[Tensor, "B H capacity"],
        same: Mapping[str, str] | None = None,
    ) -> "BucketRows":
        """Use tensors that exist already, such as a mapped file or views, without a copy."""
        rows = cls((*vectors, *(same or {})), tokens.dtype, same)
        rows.vectors, rows.lists, rows.tokens = dict(vectors), lists, tokens
        rows._plain = False
        rows._name_same()
        return rows

    @property
    def held(self) -> dict[str, Tensor]:
        """Vectors by name, each once."""
        return {name: t for name, t in self.vectors.items() if name not in self.same}

    def _name_same(self) -> None:
        self.vectors |= {name: self.vectors[other] for name, other in self.same.items()}

    @property
    def capacity(self) -> int:
        return 0 if self.tokens is None else self.tokens.shape[2]

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers())

    def _buffers(self) -> list[Tensor]:
        return [] if self.tokens is None else [*self.held.values(), self.lists, self.tokens]

    @property
    def plain(self) -> bool:
        """Whether row i holds token i, in list 0, and so do rows that are not used yet."""
        return self._plain

    def clear(self) -> None:
        """Free all buffers: as new, for any batch and shape."""
        self.vectors, self.lists, self.tokens, self._plain = {}, None, None, True

    def reserve(self, n: int, like: Tensor, used: int) -> None:
        """Make room for n rows of each sequence; the first `used` rows stay.

        `like [B, H, T, D]` gives shape, dtype and device of a first reservation. Raises
        MemoryError when there is no room; everything stored is then unchanged.
        """
        if n <= self.capacity:
            return
        size = n + SPARE_ROWS if self.capacity == 0 else max(n, used + used // GROWTH + SPARE_ROWS)
        batch, heads, _, dim = like.shape
        shape = (batch, heads, size)
        try:
            own = [name for name in self.names if name not in self.same]
            for name in own:
                self._grow(self.vectors, name, (*shape, dim), like.dtype, like.device, used)
            self._name_same()
            # Capacity is that of `tokens`, which grows last: a failure half-way changes nothing.
            self._grow(vars(self), "lists", shape, torch.int32, like.device, used)
            self.lists[:, :, used:] = 0
            self._grow(vars(self), "tokens", shape, self.token_dtype, like.device, used)
            new = self.tokens[:, :, used:]
            new[:] = torch.arange(used, size, dtype=new.dtype, device=new.device)
        except RuntimeError as error:
            if not _is_of_memory(error):
                raise
            n_bytes = len(own) * batch * heads * size * dim * like.element_size()
            raise MemoryError(
                f"no memory to grow a layer's rows from {self.capacity} to {size} "
                f"({n_bytes:,} bytes): its {used} tokens are kept"
            ) from error

    @staticmethod
    def _grow(owner: dict, name: str, shape: tuple, dtype, device, used: int) -> None:
        new = huge_pages.empty(shape, dtype, device)
        if used:
            new[:, :, :used] = owner[name][:, :, :used]
        owner[name] = new

    def blank(self, lengths: Sequence[int], until: int) -> None:
        """Rows from each sequence's length to before `until`, which nothing uses, hold nothing."""
        numbers = torch.arange(until, dtype=self.token_dtype, device=self.tokens.device)
        for b, n in enumerate(lengths):
            for buffer in (*self.held.values(), self.lists):
                buffer[b, :, n:until] = 0
            self.tokens[b, :, n:until] = numbers[n:]  # `plain` rows are numbered before they come

    def write(
        self,
        sequence: slice | int,
        start: int,
        vectors: Sequence[Tensor],
        lists: Tensor | int,
        tokens: Tensor | None = None,
    ) -> None:
        """Write new vectors `[B or none, H, T, D]`, one for each name, to the rows from `start`.

        `tokens`: what to call them; by default a token has the number of its row.
        """
        length = vectors[0].shape[-2]
        rows = slice(start, start + length)
        for name, new in zip(self.names, vectors, strict=True):
            if name not in self.same:
                self.vectors[name][sequence, :, rows] = new
        if self._plain and tokens is None and isinstance(lists, int) and lists == 0:
            return  # as it is written already
        self._plain = False
        self.lists[sequence, :, rows] = lists
        if tokens is not None:
            self.tokens[sequence, :, rows] = tokens
        elif length == 1:
            self.tokens[sequence, :, rows] = start
        else:
            self.tokens[sequence, :, rows] = torch.arange(
                start, rows.stop, dtype=self.token_dtype, device=self.tokens.device
            )

    def permute(
        self, sequence: int, first: int, order: Int[Tensor, "H n"], n_kept: int = 0
    ) -> None:
        """Replace row `first + i` by what row `first + order[:, i]` was.

        `n_kept`: entries of `order` below it ascend, so their rows only move to the back. When
        they are most of the rows, rows move in place, from the last to the first, a few at a time
        through a buffer; otherwise one head's rows are copied at once. `order` may leave rows out.
        """
        n = order.shape[1]
        self._plain = False
        for buffer in (self.lists, self.tokens):
            own = buffer[sequence, :, first:]
            own[:, :n] = own.gather(1, order)
        for buffer in self.held.values():
            for head, own_order in enumerate(order):
                rows = buffer[sequence, head, first:]
                if n_kept * 4 < n * 3:
                    rows[:n] = rows.index_select(0, own_order)
                else:
                    _move_back(rows, own_order, n_kept)

    def select(self, sequences: Int[Tensor, " B2"], used: int) -> None:
        """Replace sequence i by what sequence `sequences[i]` was; their number may change."""
        chosen = sequences.tolist()
        if len(chosen) != self.tokens.shape[0]:
            self._plain = False
            self.vectors = {n: _taken(t, chosen, used) for n, t in self.held.items()}
            self._name_same()
            self.lists = _taken(self.lists, chosen, used)
            self.tokens = _taken(self.tokens, chosen, used)
            return
        changed = [i for i, source in enumerate(chosen) if i != source]
        if not changed:
            return
        sources = sequences[torch.tensor(changed, device=sequences.device)]
        for buffer in self._buffers():
            for head in range(buffer.shape[1]):  # head by head: the copy on the way stays small
                taken = buffer[:, head, :used].index_select(0, sources.to(buffer.device))
                for mine, rows in zip(changed, taken, strict=True):
                    buffer[mine, head, :used] = rows


def _is_of_memory(error: RuntimeError) -> bool:
    """Of a GPU's allocator, or of the CPU's, which has no class for it; not any other failure."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return "allocate" in str(error) or "overflow" in str(error)


def _taken(buffer: Tensor, chosen: list[int], used: int) -> Tensor:
    new = huge_pages.empty((len(chosen), *buffer.shape[1:]), buffer.dtype, buffer.device)
    for mine, source in enumerate(chosen):
        new[mine, :, :used] = buffer[source, :, :used]
    return new


def merged_order(lists: Int[Tensor, "H n"], n_sorted: int) -> Int[Tensor, "H n"]:
    """The stable order by list of rows of which the first `n_sorted` are sorted already.

    The result is that of a stable `argsort`, without sorting the sorted rows again.
    """
    new, by_list = lists[:, n_sorted:].sort(dim=1, stable=True)
    place = torch.searchsorted(lists[:, :n_sorted].contiguous(), new, right=True)
    place += torch.arange(new.shape[1], device=lists.device)
    is_new = torch.zeros(lists.shape, dtype=torch.bool, device=lists.device)
    is_new.scatter_(1, place, True)
    order = (~is_new).cumsum(1) - 1
    return order.scatter_(1, place, by_list + n_sorted)


def _move_back(rows: Tensor, order: Int[Tensor, " n"], n_kept: int) -> None:
    """Do what `permute` does for one head; the rows from `n_kept` on are few and copied first."""
    new = rows[n_kept : len(order)].clone()
    still = (order[:n_kept] == torch.arange(n_kept, device=order.device)).cumprod(0)
    unmoved = int(still.sum())
    if n_kept:
        sources = order.clamp(max=n_kept - 1)  # for new rows any value: they are written last
        buffer = rows.new_empty(MOVED_AT_ONCE, rows.shape[1])
        for stop in range(len(order), unmoved, -MOVED_AT_ONCE):
            start = max(unmoved, stop - MOVED_AT_ONCE)
            moved = buffer[: stop - start]
            torch.index_select(rows, 0, sources[start:stop], out=moved)
            rows[start:stop] = moved
    inserted = (order >= n_kept).nonzero()[:, 0]
    rows[inserted] = new[order[inserted] - n_kept]
