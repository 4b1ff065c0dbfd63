"""The KV store of one layer: rows, lists, chunks, and what is saved of them."""

from .chunks import attend_chunk
from .store import KVStore

__all__ = ["KVStore", "attend_chunk"]
