"""The only package that imports transformers.

`attached` lets a model decode with `generate()` over a `SaapCache`; `routed` hands the model's
attention to a handler, for training an index.
"""

from . import packaged
from .attach import SaapModel, attached
from .attention import Handler, LayerCall, routed
from .cache import SaapCache
from .cache_argument import over
from .families import ModelLayer, model_layers
from .models import (
    attention_modules,
    describe,
    fingerprint,
    first_line,
    load_model,
    load_tokenizer,
    max_context,
    rope_variant,
)
from .pace import Tally, Verify
from .reading import ReadContext, cache_from, dynamic_cache_from, read_context, rewind

__all__ = [
    "Handler",
    "LayerCall",
    "ModelLayer",
    "ReadContext",
    "SaapCache",
    "SaapModel",
    "Tally",
    "Verify",
    "attached",
    "attention_modules",
    "cache_from",
    "describe",
    "dynamic_cache_from",
    "fingerprint",
    "first_line",
    "load_model",
    "load_tokenizer",
    "max_context",
    "model_layers",
    "over",
    "packaged",
    "read_context",
    "rewind",
    "rope_variant",
    "routed",
]
