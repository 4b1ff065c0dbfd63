"""An estimate of the rows that a step leaves out, added to attention over those that it visits."""

from .api import Moments, PreparedRest, add_rest

__all__ = ["Moments", "PreparedRest", "add_rest"]
