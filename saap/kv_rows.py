"""The rows of a KV store: preallocated buffers of all sequences, and how rows move in them."""

import torch
from jaxtyping import Int
from torch import Tensor

GROWTH = 8  # a full buffer grows by an eighth, so that little memory lies idle
SPARE_ROWS = 64
MOVED_AT_ONCE = 2048


class KVRows:
    """`k, v [B, Hkv, capacity, D]`, and for each row its list and its token, int32.

    `lists` is -1 while a row has no list yet; `tokens` numbers the tokens of a sequence from 0.
    Every KV head keeps its own order of rows. Rows at and after a sequence's length hold nothing.
    """

    def __init__(self):
        self.k = self.v = self.lists = self.tokens = None

    @property
    def capacity(self) -> int:
        return 0 if self.tokens is None else self.tokens.shape[2]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._buffers().values())

    def _buffers(self) -> dict[str, Tensor]:
        names = ("k", "v", "lists", "tokens")
        return {n: getattr(self, n) for n in names if getattr(self, n) is not None}

    def reserve(self, n: int, like: Tensor, used: int) -> None:
        """Room for n rows of each sequence; keys are as `like [B, Hkv, T, D]`, `used` rows stay.

        Raises MemoryError when there is none, and then everything stored is as it was.
        """
        if n <= self.capacity:
            return
        size = n + SPARE_ROWS if self.capacity == 0 else max(n, used + used // GROWTH + SPARE_ROWS)
        batch, heads, _, dim = like.shape
        # Capacity is that of `tokens`, which grows last: a failure half-way changes nothing.
        for name in ("k", "v", "lists", "tokens"):
            shape = (batch, heads, size, dim) if name in "kv" else (batch, heads, size)
            dtype = like.dtype if name in "kv" else torch.int32
            try:
                new = torch.empty(shape, dtype=dtype, device=like.device)
            except RuntimeError as error:
                n_bytes = batch * heads * size * dim * like.element_size()
                raise MemoryError(
                    f"no memory to grow a layer's KV store from {self.capacity} to {size} rows "
                    f"({2 * n_bytes:,} bytes): the {used} tokens in it are kept"
                ) from error
            if used:
                new[:, :, :used] = getattr(self, name)[:, :, :used]
            setattr(self, name, new)

    def write(
        self, sequence: slice | int, start: int, k: Tensor, v: Tensor, lists: Tensor | int
    ) -> None:
        """Put new tokens `[B | none, Hkv, T, D]` in rows from `start`, where tokens equal rows."""
        rows = slice(start, start + k.shape[-2])
        self.k[sequence, :, rows] = k
        self.v[sequence, :, rows] = v
        self.lists[sequence, :, rows] = lists
        if k.shape[-2] == 1:
            self.tokens[sequence, :, rows] = start
        else:
            self.tokens[sequence, :, rows] = torch.arange(
                start, rows.stop, dtype=torch.int32, device=k.device
            )

    def permute(
        self, sequence: int, first: int, order: Int[Tensor, "Hkv n"], n_kept: int = 0
    ) -> None:
        """Row `first + i` becomes what row `first + order[:, i]` was.

        `n_kept`: sources below it come in ascending order and move to the back only, and few are
        above; then rows move in place, from the last to the first, a few at a time through a
        buffer. Otherwise one head's rows are copied at once.
        """
        n = order.shape[1]
        for buffer in (self.lists, self.tokens):
            own = buffer[sequence, :, first:]
            own[:, :n] = own.gather(1, order)
        for buffer in (self.k, self.v):
            for head, own_order in enumerate(order):
                rows = buffer[sequence, head, first:]
                if n_kept * 4 < n * 3:
                    rows[:n] = rows.index_select(0, own_order)
                else:
                    _move_back(rows, own_order, n_kept)

    def select(self, sequences: Int[Tensor, " B2"], used: int) -> None:
        """Sequence i becomes what sequence `sequences[i]` was; their number may change."""
        chosen = sequences.tolist()
        if len(chosen) != self.tokens.shape[0]:
            for name, buffer in self._buffers().items():
                new = buffer.new_empty(len(chosen), *buffer.shape[1:])
                for mine, source in enumerate(chosen):
                    new[mine, :, :used] = buffer[source, :, :used]
                setattr(self, name, new)
            return
        changed = [i for i, source in enumerate(chosen) if i != source]
        if not changed:
            return
        sources = sequences[torch.tensor(changed, device=sequences.device)]
        for buffer in self._buffers().values():
            for head in range(buffer.shape[1]):  # head by head: the copy on the way stays small
                taken = buffer[:, head, :used].index_select(0, sources.to(buffer.device))
                for mine, rows in zip(changed, taken, strict=True):
                    buffer[mine, head, :used] = rows


def _move_back(rows: Tensor, order: Int[Tensor, " n"], n_kept: int) -> None:
    """As `permute`, of one head; the rows from `n_kept` on are few and are copied first."""
    new = rows[n_kept : len(order)].clone()
    still = (order[:n_kept] == torch.arange(n_kept, device=order.device)).cumprod(0)
    unmoved = int(still.sum())
    for stop in range(len(order), unmoved, -MOVED_AT_ONCE):
        start = max(unmoved, stop - MOVED_AT_ONCE)
        source = order[start:stop]
        moved = rows.index_select(0, source.clamp(max=n_kept - 1))
        inserted = (source >= n_kept).nonzero()[:, 0]
        moved[inserted] = new[source[inserted] - n_kept]
        rows[start:stop] = moved
