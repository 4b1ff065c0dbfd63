"""One token's rows, written behind those of the tokens before it, step after step."""

from .api import PreparedAppend

__all__ = ["PreparedAppend"]
