"""An estimate of the rows that a step leaves out, added to attention over those that it visits."""

from .api import Moments, PreparedRest, add_rest
from .scored import Scored

__all__ = ["Moments", "PreparedRest", "Scored", "add_rest"]
