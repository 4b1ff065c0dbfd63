"""Coded keys and the rows that they choose: `api` is public, the other modules implement it."""

from .api import PreparedChoice, select_rows
from .coding import encode, encode_rows
from .layout import Codes, candidates_of, coordinates_for, decode
from .query_map import QueryMap
from .weights import coarse_scores, codes_of_rows, weigh_rows

__all__ = [
    "Codes", "PreparedChoice", "QueryMap", "candidates_of", "coarse_scores", "codes_of_rows",
    "coordinates_for", "decode", "encode", "encode_rows", "select_rows", "weigh_rows",
]  # fmt: skip
