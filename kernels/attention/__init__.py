"""Decode attention over ranges of a KV store: `api` is public, the other modules implement it."""

from .api import PreparedRanges, attend_dense, attend_ranges, attend_shared_prefix, merge_states

__all__ = [
    "PreparedRanges", "attend_dense", "attend_ranges", "attend_shared_prefix", "merge_states",
]  # fmt: skip
