"""A cache for `generate()` whose layers of full attention are KV stores."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from saap.kv import KVStore
from saap.kv.file_rows import RowReads
from saap.notebook import line, size, table
from saap.stateful import uncompiled

from . import unsearched
from .attention import LayerCall
from .folders import CacheFolder
from .forward import Forward
from .pace import Pace


class SaapLayer(CacheLayerMixin):
    """One layer of full attention. The attention function writes to `store`; `update` does not.

    transformers counts slots, padding included; the store holds tokens only.
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

    def cut(self, slots: int, lengths: list[int]) -> None:
        """Keep so many slots and tokens of each sequence; a forward may have broken off."""
        held = self.store.lengths
        self.store.truncate([n - left for n, left in zip(held, lengths, strict=True)])
        self.slots = slots

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 hands over a tensor
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes 0 or less, minus the tokens to remove; got {tokens_to_remove}"
            )
        left = self.left_after(-tokens_to_remove)
        held = self.store.lengths
        self.store.truncate([n - m for n, m in zip(held, left, strict=True)])
        self.slots = max(0, self.slots + tokens_to_remove)

    def reset(self) -> None:
        self.store.reset()
        self.slots = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.store.select_sequences(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.store.select_sequences(torch.arange(self.store.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.store.select_sequences(torch.arange(self.store.batch)[indices.cpu()])

    def offload(self) -> None:
        raise ValueError("a SaapCache must stay on the device of its model; got offloading=True")


@dataclass
class Trial:
    """How many of the tokens that were added on trial stay."""

    keep: int = 0


class SaapCache(Cache):
    """Made by `SaapModel.cache()`; pass it as `cache`, before transformers 5.24 `past_key_values`.

    It belongs to that model and to its `with saap.attached(...)` block, and refuses any other use.
    Beams share no memory: reordering copies the sequences that change.
    """

    def __init__(self, layers: list[CacheLayerMixin], owner, folder: CacheFolder | None = None):
        super().__init__(layers=layers)
        self.owner, self.folder = owner, folder
        self.budget = owner.budget  # as the block's was when its stores were made
        self.last_positions: list[int] = []
        self._lengths: list[int] = []
        self._forward: Forward | None = None
        self.observer: Callable[[LayerCall], None] | None = None
        """Called with every attention call over this cache: for measuring."""
        self.pace: Pace | None = None
        """What lossless decoding over this cache has learned and counted; None before it."""
        self.torn = False
        """Whether a forward was broken off that had moved states on, or may have."""
        self.exact = False
        """Whether a forward of one token visits every row too, as one of several does."""

    @uncompiled
    def __deepcopy__(self, memo: dict) -> "SaapCache":
        """A cache of the same block, which goes on by itself; the model is not copied."""
        if self.folder is not None:
            raise ValueError("a cache in a directory must stay the only one there; got a copy")
        own = {**vars(self), "owner": None, "observer": None, "_forward": None}
        copied = memo[id(self)] = object.__new__(type(self))
        vars(copied).update(copy.deepcopy(own, memo))
        copied.owner = self.owner
        return copied

    def __reduce__(self):
        raise TypeError(
            "a SaapCache must be kept by save_context(), or copied by copy.deepcopy(); got pickle"
        )

    @property
    def saap_layers(self) -> list[SaapLayer]:
        return [layer for layer in self.layers if isinstance(layer, SaapLayer)]

    @property
    def states(self) -> list:
        """Layers that keep a state, with attention or without."""
        return [layer for layer in self.layers if unsearched.keeps_state(layer)]

    @property
    def slot_counts(self) -> set[int]:
        """Slots of layers that count them; one number unless a forward was broken off."""
        uncounted = unsearched.is_state, unsearched.holds_nothing
        counted = (layer for layer in self.layers if not any(own(layer) for own in uncounted))
        return {layer.get_seq_length() for layer in counted}

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence, without padding."""
        stores = self.saap_layers
        return list(stores[0].store.lengths if stores else self._lengths)

    @property
    def nbytes(self) -> int:
        """Bytes held for keys, values and lists of all layers."""
        return sum(
            layer.store.nbytes + unsearched.state_bytes(layer)
            if isinstance(layer, SaapLayer)
            else unsearched.nbytes(layer)
            for layer in self.layers
        )

    @property
    def file_bytes(self) -> int:
        """Bytes of keys and values in files; 0 without a directory."""
        return 0 if self.folder is None else self.folder.file_bytes

    @property
    def reads(self) -> RowReads:
        """What steps have read so far from a cache in a directory, and hits in its fast memory."""
        return RowReads() if self.folder is None else self.folder.reads

    def close(self) -> None:
        """Free the directory for other processes; this cache cannot be used any more."""
        if self.folder is not None:
            self.folder.close()

    def _facts(self) -> list[tuple[str, object]]:
        held = ", ".join(f"{n:,}" for n in self.lengths[:4]) + (", ..." * (len(self.lengths) > 4))
        return [
            ("tokens", held or 0),
            ("layers searched", f"{len(self.saap_layers)} of {len(self.layers)}"),
            ("last step visited", f"{self.visited_share:.1%}"),
            ("memory", size(self.nbytes)),
        ]

    def __repr__(self) -> str:
        return line("SaapCache", self._facts())

    def _repr_html_(self) -> str:
        return table("SaapCache", self._facts())

    @property
    def visited_share(self) -> float:
        """The share of all rows that the last step visited: mean over layers of full attention."""
        shares = [layer.store.visited_share for layer in self.saap_layers]
        return sum(shares) / len(shares) if shares else 1.0

    @property
    def read_share(self) -> float:
        """What forwards of several tokens visited, as a share of the rows that dense attention
        would have visited in all layers of full attention: 1 without a `PrefillBudget`."""
        read = [x.store.rows_read for x in self.saap_layers if isinstance(x.store, KVStore)]
        seen = sum(own.seen for own in read)
        return sum(own.visited for own in read) / seen if seen else 1.0

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if self._forward is None:
            raise ValueError(
                "this SaapCache must be used by its attached model inside `with "
                "saap.attached(...)`; got a use by another model or after that block"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def begin_forward(
        self, batch: int, length: int, mask: Tensor | dict | None, positions: Tensor | None
    ) -> "Forward":
        """Check the input of one forward, and make room for it.

        Raises ValueError for a batch, mask or positions that do not continue what is stored, and
        for a cache that another forward is using.
        """
        if self._forward is not None:
            raise ValueError("a cache must be used by one forward at a time; got a second one")
        self.check_whole()
        if self.folder is not None:
            self.folder.before_forward(self)
        forward = Forward(self, batch, length, mask, positions)
        self._forward = forward
        return forward

    def check_whole(self) -> None:
        """ValueError after a forward that was broken off with some layers ahead of others."""
        held = [layer.store.lengths for layer in self.saap_layers]
        if self.torn or len(self.slot_counts) > 1 or any(n != held[0] for n in held):
            raise ValueError(
                "the layers of a cache must hold the same tokens; got others, because a forward "
                "was broken off: start a new cache"
            )

    def end_forward(self, broken: bool = False) -> None:
        """`broken`: an error or an interrupt ended the forward."""
        forward, self._forward = self._forward, None
        self.torn = self.torn or (broken and bool(self.states))
        if self.slot_counts <= {forward.slots_after}:
            self.last_positions, self._lengths = forward.ends, forward.lengths_after

    @contextmanager
    def on_trial(self) -> Iterator[Trial]:
        """Of the tokens that are added while it is open, only the first `Trial.keep` stay.

        This is also so if a forward breaks off in between.
        """
        slots, lengths, positions = self.get_seq_length(), self.lengths, self.last_positions
        sliding = [
            layer
            for layer in self.layers
            if not (isinstance(layer, SaapLayer) or unsearched.holds_nothing(layer))
        ]
        recorded = [layer.record_past for layer in sliding]
        self.activate_past_recording()  # else a window cannot be moved back
        trial = Trial()
        try:
            yield trial
        finally:
            kept = [n + trial.keep for n in lengths]
            for layer in self.saap_layers:
                layer.cut(slots + trial.keep, kept)
            for layer, before in zip(sliding, recorded, strict=True):
                layer.crop(slots + trial.keep - layer.get_seq_length())
                layer.record_past = before
            self._lengths = kept
            self.last_positions = [n + trial.keep for n in positions]

    @contextmanager
    def drafting(self) -> Iterator[None]:
        """While open, forwards of one token are sparse; their tokens are removed at the end."""
        with ExitStack() as opened:
            opened.enter_context(self.on_trial())
            for layer in self.saap_layers:
                opened.enter_context(layer.store.resting())
            exact, self.exact = self.exact, False
            try:
                yield
            finally:
                self.exact = exact

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Remove the last tokens, as in transformers: `crop(-3)` removes three.

        Raises ValueError where a layer keeps a state, and once a sliding window is full, unless
        `activate_past_recording()` was called before.
        """
        tokens_to_remove = int(tokens_to_remove)
        if not all(unsearched.can_be_cropped(state) for state in self.states):
            if not tokens_to_remove:
                return
            raise ValueError(
                "the layers of a model must keep no state for its cache to be cropped; got some "
                "that do"
            )
        full = [
            layer.sliding_window
            for layer in self.layers
            if not (isinstance(layer, SaapLayer) or unsearched.holds_nothing(layer))
            and not layer.record_past  # states record it by now
            and layer.get_seq_length() >= layer.sliding_window
        ]
        if tokens_to_remove and full:  # before any layer is cut
            raise ValueError(
                "activate_past_recording() must be called before a sliding window is full for the "
                f"cache to be cropped later; got {self.get_seq_length()} tokens in a window of "
                f"{full[0]}"
            )
        for layer in self.saap_layers if tokens_to_remove < 0 else ():
            layer.store.check_left(layer.left_after(-tokens_to_remove))
        super().crop(tokens_to_remove)
        if tokens_to_remove:
            self._lengths = [max(0, n + tokens_to_remove) for n in self._lengths]
            # Positions of an image's tokens are fewer than these: then this is too low a bound.
            held = zip(self.last_positions, self.lengths, strict=True)
            self.last_positions = [max(-1, p + tokens_to_remove) if n else -1 for p, n in held]

    def begin_at(self, last_position: int, n_tokens: int) -> None:
        """Its layers hold so many tokens of one sequence, which were not read by forwards."""
        self.last_positions, self._lengths = [last_position], [n_tokens]

    def reset(self) -> None:
        """Forget all tokens; the cache can be used again."""
        super().reset()
        self.last_positions, self._lengths, self.torn = [], [], False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select_positions(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        held = torch.arange(len(self.last_positions))
        self.reorder_cache(held.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        held = torch.arange(len(self.last_positions))
        self.reorder_cache(held[indices.cpu()])

    def _select_positions(self, chosen: Sequence[int]) -> None:
        if self.last_positions:
            self.last_positions = [self.last_positions[b] for b in chosen]
            self._lengths = [self._lengths[b] for b in chosen]
