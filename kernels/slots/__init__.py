"""Rows of a file in slots of memory: which are there, which are read, and where they are."""

from .api import Slots, fetch

__all__ = ["Slots", "fetch"]
