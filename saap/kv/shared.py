"""The KV store of a layer that has no keys and values of its own: it reads those of another one.

In Gemma 3n and in the small models of Gemma 4 the later layers attend with queries of their own to
the keys and values of an earlier layer. What such queries ask for is another thing, so each layer
has a selector of its own over the rows that they share.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saap.budget import Budget
from saap.prefill import PrefillBudget
from saap.selector import Selector
from saap.stateful import stateful

from .memory import held_bytes
from .store import KVStore

EVERY_ROW = Budget(max_tokens=0, dense_below=2**31 - 1)


class SharedStore(KVStore):
    """Reads the rows of `owner`, a store that gets every token first.

    `append` is called with the same tokens and writes nothing; `truncate` and `select_sequences`
    are called on both, on the owner first. There may be fewer queries than tokens: of the last
    ones.

    Raises ValueError for a selector that wants rows in an order of its own.
    """

    def __init__(
        self,
        selector: Selector | None,
        budget: Budget,
        owner: KVStore,
        *,
        prefill: PrefillBudget | None = None,
    ):
        if selector is not None and not selector.keeps_order:
            raise ValueError(
                "layers that share keys need a method that leaves rows in time order, such as "
                f"saap or dense; got {type(selector).__name__}"
            )
        self.owner = owner
        super().__init__(
            selector, budget, kv_dtype=owner.kv_dtype, prefill=prefill, rows=owner.rows
        )

    def _begin(self) -> None:
        super()._begin()
        self._steps.share(self.owner.rest)
        self._read: Tensor | None = None  # keys as they lay when this store last looked

    @property
    def nbytes(self) -> int:
        """Bytes held beside the rows, which are the owner's, and what it estimates."""
        own = list(self.rows.vectors.values())
        held = self._lists.nbytes + self._steps.nbytes + held_bytes(self.selector, besides=own)
        return held - self.rest.nbytes

    def _keep_up(self) -> None:
        """Let go of rows that lie elsewhere by now."""
        keys = self.rows.vectors.get("k")
        if keys is not self._read:
            self._let_go()
            self._read = keys

    def reserve(self, n: int, like: Tensor | None = None) -> None:
        """The owner has made room."""
        self._keep_up()

    @stateful
    def append(
        self,
        k_rope: Float[Tensor, "B Hkv T D"],
        v: Float[Tensor, "B Hkv T D"],
        k_derope: Float[Tensor, "B Hkv T D"],
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> None:
        """Take note of the T tokens that the owner got last.

        Raises ValueError if it did not get them.
        """
        length = k_rope.shape[2]
        new = [length] * len(k_rope) if mask is None else mask.sum(1).tolist()
        before = self.lengths or [0] * len(new)
        if self.owner.lengths != [n + m for n, m in zip(before, new, strict=True)]:
            raise ValueError(
                "a store that shares rows must get each token right after their owner; got "
                f"{new} tokens behind {before} where the owner has {self.owner.lengths}"
            )
        self._keep_up()
        self._steps.changed()
        self.flush()
        if not self.lengths:
            self._lists.begin(len(new))
        self.lengths = list(self.owner.lengths)
        self._new, self._length_new, self._new_dtype = new, length, k_rope.dtype

    @stateful
    def attend(self, q_rope, q_derope, budget=None, **options):
        """As that of `KVStore`. One query of several tokens visits every row, as several do."""
        length = q_rope.shape[2]
        if length < self._length_new:
            self._new, self._length_new = [min(n, length) for n in self._new], length
            budget = EVERY_ROW if length == 1 else budget
        return super().attend(q_rope, q_derope, budget, **options)

    def again(self, q_rope, k_rope, v, **options):
        self._keep_up()
        if self.owner.lengths != [n + 1 for n in self.lengths]:
            return None
        return super().again(q_rope, k_rope, v, **options)

    @stateful
    def select_sequences(self, sequences: Sequence[int] | Tensor) -> None:
        chosen = torch.as_tensor(sequences, device="cpu")
        if self.batch and not len(chosen):
            self.reset()
        elif self.batch:
            self._lists.assign(self.lengths)
            self._let_go()
            self._take_sequences(chosen)

    def restore(self, lengths: list[int], middles: list[int], state: dict[str, Tensor]) -> None:
        """As `KVStore.restore`, after the owner."""
        self.lengths = lengths
        self._lists.counts = middles
        if any(middles):
            self.selector.restore(state, self.middle)
        else:
            self._restore_before(state)
