"""Scoring of cells and selection of lists: `api` is public, the other modules implement it."""

from .api import Ranges, cell_weights, select_lists

__all__ = ["Ranges", "cell_weights", "select_lists"]
