"""Layers that have attention and a state side by side, as those of Falcon-H1 do."""

import copy

from torch import Tensor
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING

from saap.kv import KVStore

from .cache import SaapLayer

_State = DYNAMIC_LAYER_TYPE_MAPPING["linear_attention"]


class HybridLayer(_State, SaapLayer):
    """Keys and values are searched; the state is kept as transformers keeps it.

    It cannot be cropped, since tokens cannot be taken out of a state again.
    """

    is_compileable = False

    def __init__(self, store: KVStore, **options):
        SaapLayer.__init__(self, store)
        _State.__init__(self, **options)

    def lazy_initialization(self, *keys_and_values: Tensor, **state) -> None:
        if keys_and_values:
            SaapLayer.lazy_initialization(self, *keys_and_values)
        else:
            _State.lazy_initialization(self, **state)

    def reset(self) -> None:
        SaapLayer.reset(self)
        _State.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        SaapLayer.reorder_cache(self, beam_idx)
        _State.reorder_cache(self, beam_idx)

    def offload(self) -> None:
        SaapLayer.offload(self)


def copy_state(of, to) -> None:
    """The state of a layer becomes that of another one, whatever else these hold."""
    for name in vars(_State()):
        setattr(to, name, copy.deepcopy(getattr(of, name)))
