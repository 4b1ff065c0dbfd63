"""Choice of whole pages of a paged KV cache, by the exact scores of the tokens in them."""

from .api import select_pages

__all__ = ["select_pages"]
