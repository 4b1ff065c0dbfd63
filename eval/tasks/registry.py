"""Every task, by name."""

from saap.names import find_named

from .attention import Attention
from .base import Task
from .copying import Copying
from .drafting import Drafting
from .geometry import Geometry
from .needles import MultiKey, MultiQuery, MultiValue
from .passkey import PassKey
from .perplexity import Perplexity
from .speed import Speed
from .tracking import VariableTracking
from .words import CommonWords, FrequentWords

TASKS: dict[str, type[Task]] = {
    "attention": Attention,
    "passkey": PassKey,
    "multi-key": MultiKey,
    "multi-value": MultiValue,
    "multi-query": MultiQuery,
    "variable-tracking": VariableTracking,
    "common-words": CommonWords,
    "frequent-words": FrequentWords,
    "copying": Copying,
    "perplexity": Perplexity,
    "drafting": Drafting,
    "speed": Speed,
    "geometry": Geometry,
}
DEFAULT_TASKS = ("attention", "passkey")


def find_task(name: str) -> type[Task]:
    """The class of that name; ValueError lists the known ones and the nearest."""
    return find_named("task", name, TASKS)
