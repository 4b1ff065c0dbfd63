"""Coded keys and the rows that they choose: `api` is public, the other modules implement it."""

from .api import select_rows
from .layout import COARSE_PLANES, CODED, FINE_PLANES, Codes, decode, encode

__all__ = ["COARSE_PLANES", "CODED", "FINE_PLANES", "Codes", "decode", "encode", "select_rows"]
