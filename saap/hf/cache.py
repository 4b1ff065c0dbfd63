"""A cache for `generate()` whose layers of full attention are `saap.kv_store.KVStore`s."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from saap.kv_store import KVStore


class SaapLayer(CacheLayerMixin):
    """One layer of full attention. The attention function writes to `store`, `update` does not.

    transformers counts slots, padding included; the store holds tokens alone.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False
    supports_early_init = False

    def __init__(self, store: KVStore):
        super().__init__()
        self.store, self.slots = store, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        self.is_initialized = True
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots + query_length, 0

    def get_seq_length(self) -> int:
        return self.slots

    def get_max_length(self) -> int:
        return -1

    def left_after(self, n_slots: int) -> list[int]:
        """Tokens of each sequence that stay when the last `n_slots` slots go."""
        left = self.slots - n_slots
        return [max(0, left - (self.slots - n)) for n in self.store.lengths]

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): accepted are 0 and less, the tokens to remove"
            )
        left = self.left_after(-tokens_to_remove)
        held = self.store.lengths
        self.store.truncate([n - m for n, m in zip(held, left, strict=True)])
        self.slots = max(0, self.slots + tokens_to_remove)

    def reset(self) -> None:
        self.store.truncate(list(self.store.lengths))
        self.slots = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.store.select_sequences(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.store.select_sequences(torch.arange(self.store.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.store.select_sequences(torch.arange(self.store.batch)[indices.cpu()])

    def offload(self) -> None:
        raise ValueError("offloading=True: a SaapCache stays on the device of its model")


class SaapCache(Cache):
    """Made by `SaapModel.cache()`; pass it as `past_key_values`.

    It belongs to that model and to its `with saap.attached(...)` block, and refuses any other use.
    Beams hold their sequences apart: reordering copies those that change.
    """

    def __init__(self, layers: list[CacheLayerMixin], owner):
        super().__init__(layers=layers)
        self.owner = owner
        self.in_forward = False
        self.last_positions: list[int] = []

    @property
    def saap_layers(self) -> list[SaapLayer]:
        return [layer for layer in self.layers if isinstance(layer, SaapLayer)]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence, without padding."""
        return list(self.saap_layers[0].store.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes held for keys, values and lists of all layers."""
        sliding = [x for x in self.layers if not isinstance(x, SaapLayer) and x.is_initialized]
        return sum(layer.store.nbytes for layer in self.saap_layers) + sum(
            layer.keys.nbytes + layer.values.nbytes for layer in sliding
        )

    @property
    def visited_share(self) -> float:
        """Rows that the last step visited, of all rows, averaged over layers of full attention."""
        shares = [layer.store.visited_share for layer in self.saap_layers]
        return sum(shares) / len(shares)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if not self.in_forward:
            raise ValueError(
                "this SaapCache is used by another model, or after its block: accepted is the "
                "attached model inside `with saap.attached(...)`"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def check_forward(
        self, batch: int, length: int, mask: Tensor | None, positions: Tensor | None
    ) -> Tensor | None:
        """What one forward may bring, and room for it; the mask `[B, T]` of new tokens, or None.

        Raises ValueError for a batch, mask or positions that do not continue what is stored.
        """
        stores = [layer.store for layer in self.saap_layers]
        slots = {layer.get_seq_length() for layer in self.layers}
        if len(slots) > 1 or any(store.lengths != stores[0].lengths for store in stores):
            raise ValueError(
                "a forward over this cache was broken off, its layers differ: start a new cache"
            )
        held = stores[0].lengths or [0] * batch
        if batch != len(held):
            raise ValueError(f"a batch of {batch}: this cache holds {len(held)} sequences")
        new = None if mask is None else self._new_of_mask(mask, held, length)
        n_new = [length] * batch if new is None else new.sum(1).tolist()
        self.lengths_after = [n + m for n, m in zip(held, n_new, strict=True)]
        self._slots_after = self.get_seq_length() + length
        self._ends = self._check_positions(positions, new, n_new, length)
        for store in stores:
            if store.batch:
                store.reserve(store.length + length)
        return new

    def _new_of_mask(self, mask: Tensor, held: list[int], length: int) -> Tensor | None:
        slots = self.get_seq_length()
        if mask.ndim != 2 or mask.shape != (len(held), slots + length):
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}: accepted is [B, cached + new] = "
                f"{(len(held), slots + length)}"
            )
        new = mask[:, -length:].bool()
        whole = mask.bool().sum(1).tolist()
        expected = [n + m for n, m in zip(held, new.sum(1).tolist(), strict=True)]
        if whole != expected:
            raise ValueError(
                f"attention_mask shows {whole} tokens: with those cached it has to be {expected}"
            )
        return None if bool(new.all()) else new

    def _check_positions(
        self, positions: Tensor | None, new: Tensor | None, n_new: list[int], length: int
    ) -> list[int]:
        """The last position of each sequence after this forward."""
        if positions is None:  # the model will count slots
            positions = torch.arange(self._slots_after - length, self._slots_after)[None]
        positions = positions.expand(len(n_new), -1)
        before = self.last_positions or [-1] * len(n_new)
        backwards = positions[:, 1:] <= positions[:, :-1]
        if new is not None:
            backwards = backwards & new[:, :-1].to(backwards.device)
        rows = zip(positions.tolist() if length == 1 else positions, before, n_new, strict=True)
        first = [(int(row[length - n]), last) for row, last, n in rows if n]
        wrong = [pair for pair in first if pair[0] <= pair[1]]
        if wrong or bool(backwards.any()):
            detail = f" ({wrong[0][0]} after {wrong[0][1]})" if wrong else ""
            raise ValueError(f"position_ids go backwards{detail}: accepted are ascending ones")
        ends = positions[:, -1].tolist()
        return [end if n else last for end, last, n in zip(ends, before, n_new, strict=True)]

    def end_forward(self) -> None:
        self.in_forward = False
        if all(layer.get_seq_length() == self._slots_after for layer in self.layers):
            self.last_positions = self._ends

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if tokens_to_remove:
            self.last_positions = [n - 1 for n in self.lengths]

    def reset(self) -> None:
        super().reset()
        self.last_positions = []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select_positions(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._select_positions(
            [b for b in range(len(self.last_positions)) for _ in range(repeats)]
        )

    def batch_select_indices(self, indices: Tensor) -> None:
        before = torch.arange(len(self.last_positions))
        super().batch_select_indices(indices)
        self._select_positions(before[indices.cpu()].tolist())

    def _select_positions(self, chosen: Sequence[int]) -> None:
        if self.last_positions:
            self.last_positions = [self.last_positions[b] for b in chosen]
