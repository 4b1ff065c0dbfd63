"""Names that users give: an unknown one is refused with the nearest and all known ones."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

Named = TypeVar("Named")


def find_named(kind: str, name: str, known: Mapping[str, Named]) -> Named:
    """`known[name]`; ValueError lists the known names and the nearest. `kind`: what they name."""
    if name not in known:
        raise ValueError(
            f"{kind} {name!r} is unknown{did_you_mean(name, known)}: accepted are "
            f"{', '.join(known)}"
        )
    return known[name]


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """` (did you mean 'kmeans'?)`, its leading blank included; empty where nothing is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
