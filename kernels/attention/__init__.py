"""Decode attention over ranges of a KV store: `api` is public, the other modules implement it."""

from .api import PreparedRanges, attend_dense, attend_ranges, attend_shared_prefix, merge_states
from .int8_rows import dequantize_rows, quantize_rows

__all__ = [
    "PreparedRanges", "attend_dense", "attend_ranges", "attend_shared_prefix", "dequantize_rows",
    "merge_states", "quantize_rows",
]  # fmt: skip
