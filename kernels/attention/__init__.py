"""Decode attention over ranges of a KV store: `api` is public, the other modules implement it."""

from .api import attend_dense, attend_ranges, attend_shared_prefix, merge_states

__all__ = ["attend_dense", "attend_ranges", "attend_shared_prefix", "merge_states"]
