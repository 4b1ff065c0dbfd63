"""Choice of pages or rows of a paged KV cache by coded keys that lie where the keys lie."""

from .api import encode_rows, select_pages, select_rows
from .layout import PageCodes, rotation

__all__ = ["PageCodes", "encode_rows", "rotation", "select_pages", "select_rows"]
