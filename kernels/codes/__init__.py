"""Coded keys and the rows that they choose: `api` is public, the other modules implement it."""

from .api import PreparedChoice, select_rows
from .coding import encode_rows
from .layout import COARSE_PLANES, CODED, FINE_PLANES, Codes, decode, encode
from .query_map import QueryMap
from .weights import codes_of_rows, weigh_rows

__all__ = [
    "COARSE_PLANES", "CODED", "FINE_PLANES", "Codes", "PreparedChoice", "QueryMap",
    "codes_of_rows", "decode", "encode", "encode_rows", "select_rows", "weigh_rows",
]  # fmt: skip
