"""Attention as vector search: index the KV cache, visit the few buckets that matter, exactly.

Public names load on first use, so `import saap` is quick and needs neither FAISS nor transformers.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_EXPORTS = {
    "attend_dense": "saap.kernels.attention",
    "attend_ranges": "saap.kernels.attention",
    "attend_shared_prefix": "saap.kernels.attention",
    "merge_states": "saap.kernels.attention",
    "Budget": "saap.budget",
    "KVStore": "saap.kv",
    "LayerRouting": "saap.routing",
    "LayerInfo": "saap.selector",
    "METHODS": "saap.methods",
    "Method": "saap.methods",
    "PrefillBudget": "saap.prefill",
    "Selector": "saap.selector",
    "TrainedIndex": "saap.trained_index",
    "attached": "saap.hf",
    "partition_keys": "saap.partition",
    "train": "saap.training",
}
__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from .budget import Budget
    from .hf import attached
    from .kernels.attention import attend_dense, attend_ranges, attend_shared_prefix, merge_states
    from .kv import KVStore
    from .methods import METHODS, Method
    from .partition import partition_keys
    from .prefill import PrefillBudget
    from .routing import LayerRouting
    from .selector import LayerInfo, Selector
    from .trained_index import TrainedIndex
    from .training import train


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'saap' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
