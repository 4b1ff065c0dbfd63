"""The one package that knows transformers.

`attached` decodes with `generate()` over a `SaapCache`; `routed` hands attention to a handler, for
training an index and for evaluation.
"""

from .attach import SaapModel, attached
from .cache import SaapCache
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
from .routed import Handler, routed, run_chunks

__all__ = [
    "Handler",
    "SaapCache",
    "SaapModel",
    "attached",
    "attention_modules",
    "describe",
    "fingerprint",
    "first_line",
    "load_model",
    "load_tokenizer",
    "max_context",
    "rope_variant",
    "routed",
    "run_chunks",
]
