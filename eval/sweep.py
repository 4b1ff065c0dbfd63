"""Sweeps: what to compare, as a YAML file or as options of the command line.

    contexts: [2048, 8192]
    budgets: [0.05, 0.1]
    tasks: [attention, speed]
    methods:
      - saap
      - name: saap
        search: {top_p: [0.8, 0.9], share: [group, head]}
      - name: kmeans-online
        build: {rows_per_cluster: [8, 16]}

Lists are swept, all combinations. `build` makes another index for each; `search` asks one index
differently. Keys are those of `saap.eval.run.EvalConfig`.
"""

import dataclasses
from pathlib import Path

from .run import EvalConfig
from .variants import refuse_unknown

LISTS = ("methods", "contexts", "budgets", "tasks", "answer_budgets")


def read_sweep(path: Path) -> dict:
    """Options of an `EvalConfig`; ValueError for what is no YAML, empty, or read by no one."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: must be YAML; got another text ({error})") from error
    if not found:
        raise ValueError(f"{path}: a sweep must hold at least 'methods'; got an empty file")
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must be a mapping of keys; got {type(found).__name__}")
    kinds = {f.name: f.type for f in dataclasses.fields(EvalConfig)}
    refuse_unknown(str(path), found, tuple(kinds))
    for key, value in found.items():
        if key in LISTS:
            values = value if isinstance(value, list) else [value]
            if value is None or not values:
                raise ValueError(f"{path}: {key} must hold at least one value; got none")
            found[key] = tuple(values)
        check_kind(path, key, found[key], kinds[key])
    return found


def check_kind(path: Path, key: str, value, kind) -> None:
    members = value if isinstance(value, tuple) else (value,)
    wanted = {"contexts": int, "budgets": (int, float), "answer_budgets": (int, float),
              "tasks": str, "methods": (str, dict), "window": int}.get(key, kind)  # fmt: skip
    for member in members:
        if isinstance(member, bool) or not isinstance(member, wanted):
            names = getattr(wanted, "__name__", None) or " or ".join(w.__name__ for w in wanted)
            raise ValueError(f"{path}: {key} must be {names}; got {member!r}")


def with_parameters(
    methods: tuple[str, ...], build: list[str], search: list[str]
) -> tuple[str | dict, ...]:
    """Options `METHOD.KEY=V1,V2` of the command line, put to the methods that they name."""
    entries = {name: {"name": name, "build": {}, "search": {}} for name in methods}
    for part, options in (("build", build), ("search", search)):
        for option in options:
            place, _, values = option.partition("=")
            name, _, key = place.partition(".")
            if not (key and values):
                raise ValueError(f"--{part} must be METHOD.KEY=VALUE[,VALUE...]; got {option!r}")
            if name not in entries:
                raise ValueError(
                    f"--{part} must name a method of --methods, {', '.join(entries)}; got "
                    f"{option!r}"
                )
            entries[name][part][key] = [as_value(v) for v in values.split(",") if v]
    return tuple(
        entry if entry["build"] or entry["search"] else name for name, entry in entries.items()
    )


def as_value(text: str):
    if text in ("true", "false"):
        return text == "true"
    if text == "none":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
