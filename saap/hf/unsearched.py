"""Layers of a cache that are not searched: sliding windows, and states of other layers.

Both are transformers' own. A window holds keys and values of the latest tokens. A layer without
attention (linear attention, a convolution) has a state of one size whatever the context. Tokens
cannot be taken out of it again, but for those of a convolution that was told to record the past.
"""

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin


def is_state(layer) -> bool:
    return not isinstance(layer, CacheLayerMixin)


def can_be_cropped(layer) -> bool:
    """Whether tokens can be taken out of a layer that keeps a state."""
    return layer.record_past and getattr(layer, "is_croppable", False)


def nbytes(layer) -> int:
    """Bytes that a layer holds."""
    if is_state(layer):
        held = [*layer.conv_states.values(), *layer.recurrent_states.values()]
        return sum(state.nbytes for state in held if state is not None)
    return layer.keys.nbytes + layer.values.nbytes if layer.is_initialized else 0


def saved(layer) -> tuple[dict, dict[str, Tensor]]:
    """What a header says of a sliding window, and its tensors."""
    facts = {"cumulative_length": layer.cumulative_length}
    return facts, {"keys": layer.keys, "values": layer.values}


def restore(layer, facts: dict, tensors: dict[str, Tensor]) -> None:
    """Put what `saved` gave into a new layer."""
    layer.lazy_initialization(tensors["keys"], tensors["values"])
    layer.keys, layer.values = tensors["keys"], tensors["values"]
    layer.cumulative_length = facts["cumulative_length"]
    layer.is_initialized = True
