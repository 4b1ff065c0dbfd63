"""What is compared: methods as they are built, and the points at which each is searched.

Build parameters make another index of the context; search parameters only ask it differently, so
one build serves all points of a variant.
"""

import dataclasses
import inspect
import itertools
import types
import typing
from dataclasses import dataclass, field

from saap.budget import BOUNDS, Budget
from saap.methods import Method, find_method
from saap.names import did_you_mean

SEARCH_FIELDS = (*BOUNDS, "share", "n_sink", "window", "layer_importance", "estimate_rest")


@dataclass(frozen=True)
class Point:
    """One way to ask: a budget, and options of the method's own search."""

    label: str
    budget: Budget
    options: dict = field(default_factory=dict)

    def prepare(self, method: Method) -> None:
        """Let the method search with the options of this point."""
        if self.options:
            method.search_options = dataclasses.replace(method.search_options, **self.options)


@dataclass(frozen=True)
class Variant:
    label: str
    method: Method
    search: tuple[dict, ...] = ({},)

    def points(
        self, shares: tuple[float, ...], n_context: int, share: str, window: int = Budget.window
    ) -> list[Point]:
        """Those whose search names a bound, and all others at each share of the context."""
        found = []
        for options in self.search:
            budget = {k: v for k, v in options.items() if k in SEARCH_FIELDS}
            own = {k: v for k, v in options.items() if k not in SEARCH_FIELDS}
            told = " ".join(f"{k}={brief(v)}" for k, v in options.items())
            places = {"window": window, "share": share}
            places.update({k: v for k, v in budget.items() if k not in BOUNDS})
            bounds = {k: v for k, v in budget.items() if k in BOUNDS}
            if bounds:
                found.append(Point(told, Budget(**bounds, **places), own))
                continue
            for part in shares:
                at_share = Budget.for_selectivity(part, n_context, **places)
                found.append(Point(f"{part:g} {told}".strip(), at_share, own))
        return found


def brief(value) -> str:
    return f"({len(value)} numbers)" if isinstance(value, list) else str(value)


def make_variants(methods: tuple, index, seed: int) -> list[Variant]:
    """`methods`: names, or dicts with `name`, `build` and `search`, each a dict of values.

    A list of values is a sweep: all combinations.
    """
    variants = []
    for entry in methods:
        entry = {"name": entry} if isinstance(entry, str) else entry
        cls = find_method(entry["name"])
        searches = tuple(combinations(entry.get("search") or {}))
        for build in combinations(entry.get("build") or {}):
            told = ",".join(f"{k}={v}" for k, v in build.items())
            label = f"{cls.name}[{told}]" if told else cls.name
            variants.append(Variant(label, construct(cls, index, seed, build), searches))
    return variants


def combinations(values: dict) -> list[dict]:
    lists = [v if isinstance(v, list | tuple) else [v] for v in values.values()]
    return [dict(zip(values, choice, strict=True)) for choice in itertools.product(*lists)]


def construct(cls: type[Method], index, seed: int, build: dict) -> Method:
    plain, grouped = options_of(cls)
    arguments = {k: v for k, v in build.items() if k in plain}
    fields = {k: v for k, v in build.items() if k in grouped.get("build", (None, ()))[1]}
    if fields:
        arguments["build"] = grouped["build"][0](**fields)
    return cls(index, seed=seed, **arguments)


def options_of(cls: type[Method]) -> tuple[list[str], dict[str, tuple[type, list[str]]]]:
    """Plain keyword arguments of a method, and those (`build`, `search`) that are dataclasses."""
    hints = typing.get_type_hints(cls.__init__)
    plain, grouped = [], {}
    for name in inspect.signature(cls.__init__).parameters:
        if name in ("self", "index", "seed"):
            continue
        kinds = [k for k in typing.get_args(hints.get(name)) if dataclasses.is_dataclass(k)]
        if kinds:
            grouped[name] = (kinds[0], [f.name for f in dataclasses.fields(kinds[0])])
        else:
            plain.append(name)
    return plain, grouped


def check_method_entry(entry) -> None:
    """Raise ValueError for a name, key or value that nothing uses."""
    if isinstance(entry, str):
        find_method(entry)
        return
    refuse_unknown("method", entry, ("name", "build", "search"))
    if "name" not in entry:
        raise ValueError(f"a method must be a mapping with 'name'; got {entry!r}")
    cls = find_method(entry["name"])
    if cls.is_exact and (entry.get("build") or entry.get("search")):
        raise ValueError(f"{cls.name} visits everything: it must have no build and no search")
    plain, grouped = options_of(cls)
    known = {
        "build": (*plain, *grouped.get("build", (None, ()))[1]),
        "search": (*SEARCH_FIELDS, *grouped.get("search", (None, ()))[1]),
    }
    for part, names in known.items():
        values = entry.get(part) or {}
        if not isinstance(values, dict):
            raise ValueError(f"{part} of {cls.name} must be a mapping of keys; got {values!r}")
        refuse_unknown(f"{part} of {cls.name}", values, names)
        for key, value in values.items():
            if value is None or value == []:
                raise ValueError(
                    f"{part} of {cls.name}: {key} must be a value or a list of values; got none"
                )
            owner, fields = grouped.get(part, (None, ()))
            hints = typing.get_type_hints(owner if key in fields else cls.__init__)
            check_number(f"{part} of {cls.name}", key, value, hints.get(key))


def check_number(where: str, key: str, value, hint) -> None:
    """Raise ValueError for a value that an option of numbers cannot have."""
    kinds = typing.get_args(hint) or (hint,)
    if not set(kinds) <= {int, float, types.NoneType}:
        return
    for own in value if isinstance(value, list | tuple) else (value,):
        if type(own) not in kinds and not (type(own) is int and float in kinds):
            number = "a number" if float in kinds else "a whole number"
            none = " or none" if types.NoneType in kinds else ""
            raise ValueError(f"{where}: {key} must be {number}{none}; got {own!r}")


def refuse_unknown(where: str, values: dict, known: tuple[str, ...]) -> None:
    for key in values:
        if key not in known:
            raise ValueError(
                f"{where}: a key must be one of {', '.join(known) or 'none'}; got {key!r}"
                f"{did_you_mean(key, known)}"
            )
