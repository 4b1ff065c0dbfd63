"""One forward over a `SaapCache`: its input is checked, then each layer's call is answered."""

import torch
from torch import Tensor

from saap.kv import attend_chunk
from saap.kv.checks import check_left_padded
from saap.kv.chunks import attend_visible
from saap.kv.shared import EVERY_ROW

from .attention import LayerCall
from .families import CHUNKED, FULL, SLIDING
from .masks import masks_of


class Forward:
    """The handler of one forward, made by `SaapCache.begin_forward`; raises what that raises."""

    def __init__(
        self, cache, batch: int, length: int, mask: Tensor | dict | None, positions: Tensor | None
    ):
        self.cache, self.length = cache, length
        stores = [layer.store for layer in cache.saap_layers]
        held = cache.lengths or [0] * batch
        if not length:
            raise ValueError("a forward must be of at least one token; got none")
        if batch != len(held):
            raise ValueError(f"the batch must be {len(held)}, as in the cache; got {batch}")
        self.masks = masks_of(mask, batch, cache.get_seq_length(), length, cache.owner.windows)
        if FULL in self.masks.visible and not all(store.in_time_order for store in stores):
            raise ValueError(
                "a mask in which tokens see later ones, as those of an image, needs a whole "
                "context and a method that leaves rows in time order, such as saap or dense; got "
                f"{cache.owner.method.name!r}" + " over a group" * (cache.owner.group is not None)
            )
        mask = self.masks.tokens
        self.new_mask = None if mask is None else self._new_of_mask(mask, held, length)
        n_new = [length] * batch if self.new_mask is None else self.new_mask.sum(1).tolist()
        self.lengths_after = [n + m for n, m in zip(held, n_new, strict=True)]
        self.slots_after = cache.get_seq_length() + length
        self.ends = self._check_positions(positions, n_new, length)
        for store in stores:
            if store.batch:
                store.reserve(store.length + length)

    def __call__(self, call: LayerCall) -> tuple[Tensor, Tensor]:
        """Attention of one layer over the cache."""
        if self.cache.observer is not None:
            self.cache.observer(call)
        layer = self.cache.layers[call.layer]
        if call.sliding_window is not None:
            # transformers has updated the layer already, and hands over all that is in reach.
            kind = CHUNKED if call.chunked else SLIDING
            visible = self.masks.of_kind(kind, call.q_rope.shape[2])
            return attend_sliding(call, self.lengths_after, visible)
        store, q, k = layer.store, call.q_rope, call.k_rope
        options = {"sm_scale": call.sm_scale, "softcap": call.softcap}
        if self.length == 1 and self.new_mask is None and not self.cache.exact:
            found = store.again(q, k, call.v, **options)
            if found is not None:
                layer.slots += 1
                return found
        q_derope, k_derope = q, k
        if store.selector is not None and store.selector.reads_derope:
            q_derope, k_derope = call.q_derope, call.k_derope
        store.append(k, call.v, k_derope, self.new_mask)
        layer.slots += self.length
        visible = self.masks.of_kind(FULL, q.shape[2])
        if visible is not None:
            return store.attend_visible(q, visible, self.masks.tokens, **options)
        budget = EVERY_ROW if self.cache.exact else None
        return store.attend(q, q_derope, budget, **options)

    def _new_of_mask(self, mask: Tensor, held: list[int], length: int) -> Tensor | None:
        slots = self.cache.get_seq_length()
        if mask.ndim != 2 or mask.shape != (len(held), slots + length):
            raise ValueError(
                f"attention_mask must be [B, cached + new] = {(len(held), slots + length)}; got "
                f"{tuple(mask.shape)}"
            )
        new = mask[:, -length:].bool()
        whole = mask.bool().sum(1).tolist()
        expected = [n + m for n, m in zip(held, new.sum(1).tolist(), strict=True)]
        if whole != expected:
            raise ValueError(
                f"attention_mask must show {expected} tokens, with those cached; got {whole}"
            )
        if bool(new.all()):
            return None
        check_left_padded(new, held)  # before any layer moves on
        return new

    def _check_positions(
        self, positions: Tensor | None, n_new: list[int], length: int
    ) -> list[int]:
        """The last position of each sequence after this forward."""
        if positions is None:  # the model will count slots
            positions = torch.arange(self.slots_after - length, self.slots_after)[None]
        on_axes = positions.ndim == 3  # time, height and width, alike but for parts of an image
        if on_axes:
            positions = positions[-3:].amax(0)
        positions = positions.expand(len(n_new), -1)
        before = self.cache.last_positions or [-1] * len(n_new)
        backwards = positions[:, 1:] <= positions[:, :-1]
        if on_axes:
            backwards = torch.zeros_like(backwards)
        elif self.new_mask is not None:
            backwards = backwards & self.new_mask[:, :-1].to(backwards.device)
        rows = zip(positions.tolist() if length == 1 else positions, before, n_new, strict=True)
        first = [(int(row[length - n]), last) for row, last, n in rows if n]
        wrong = [pair for pair in first if pair[0] <= pair[1]]
        if wrong or bool(backwards.any()):
            got = "others"
            if wrong:
                got = f"{wrong[0][0]} after {wrong[0][1]}, the last that the cache holds"
            raise ValueError(f"position_ids must ascend; got {got}")
        ends = positions.amax(1).tolist()
        return [end if n else last for end, last, n in zip(ends, before, n_new, strict=True)]


def attend_sliding(
    call: LayerCall, lengths: list[int], visible: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention within a window, sliding or in chunks, over the call's slots, the newest last.

    Padding is on the left; where the window reaches it, it is cut off, sequence by sequence.
    `lengths`: tokens of each sequence, including those of this call. `visible [B, T, slots]`: what
    each token sees, where that is not all of the window up to itself.
    """
    q, k, v = call.q_rope, call.k_rope, call.v
    options = {"sm_scale": call.sm_scale, "softcap": call.softcap}
    if visible is not None:
        return attend_visible(q, k, v, visible[:, :, -k.shape[2] :], **options)
    if call.chunked:
        return _attend_in_chunks(call, lengths, **options)
    options["sliding_window"] = call.sliding_window
    padding = [max(0, k.shape[2] - n) for n in lengths]
    if not any(padding):
        return attend_chunk(q, k, v, **options)
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:3], -torch.inf, device=q.device, dtype=torch.float32)
    for b, n in enumerate(padding):
        skipped = max(0, n - (k.shape[2] - q.shape[2]))
        if skipped < q.shape[2]:
            own = slice(b, b + 1)
            out[own, :, skipped:], lse[own, :, skipped:] = attend_chunk(
                q[own, :, skipped:], k[own, :, n:], v[own, :, n:], **options
            )
    return out, lse


def _attend_in_chunks(call: LayerCall, lengths: list[int], **options) -> tuple[Tensor, Tensor]:
    """Each token sees those before it in its own chunk of tokens, padding not counted."""
    q, k, v, size = call.q_rope, call.k_rope, call.v, call.sliding_window
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:3], -torch.inf, device=q.device, dtype=torch.float32)
    together = len(set(lengths)) == 1
    for b, n in enumerate(lengths[:1] if together else lengths):
        own = slice(None) if together else slice(b, b + 1)
        before_queries, before_keys = q.shape[2] - n, k.shape[2] - n  # slots before token 0
        token = max(0, -before_queries)
        while token < n:
            first = token // size * size
            end = min(n, first + size)
            queries = slice(before_queries + token, before_queries + end)
            keys = slice(before_keys + first, before_keys + end)
            out[own, :, queries], lse[own, :, queries] = attend_chunk(
                q[own, :, queries], k[own, :, keys], v[own, :, keys], **options
            )
            token = end
    return out, lse
