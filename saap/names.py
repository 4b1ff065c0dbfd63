"""Look up names that users give; the error for an unknown name lists the known ones."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

Named = TypeVar("Named")


def find_named(kind: str, name: str, known: Mapping[str, Named]) -> Named:
    """Return `known[name]`; a ValueError lists the known names. `kind`: what the names are of."""
    if name not in known:
        raise ValueError(
            f"{kind} must be one of {', '.join(known)}; got {name!r}{did_you_mean(name, known)}"
        )
    return known[name]


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """` (did you mean 'kmeans'?)`, with a leading blank; empty when no name is similar."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
