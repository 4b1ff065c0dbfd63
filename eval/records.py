"""Raw records: one JSON object a line, written before anything is scored, never edited after.

A run is a list of units of work. A unit's records are followed by `{"done": unit}`; records of a
unit that was cut short are dropped when the run continues.
"""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from saap.index.tensor_files import write_atomically

from .record_fields import check_records, is_count

RECORDS, RUN = "records.jsonl", "run.json"
LAYOUT = ("context", "sinks", "window")
# What a run that continues has to share with its beginning, besides config, threads and version.
SAME = ("model", "weights", "text", "index")


class RecordFile:
    """Appends the records of whole units to `folder/records.jsonl`."""

    def __init__(self, folder: Path, run: dict):
        self.path = folder / RECORDS
        run_path = folder / RUN
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if is_begun(folder):
                self._check_same_run(run_path, run)
            else:
                if run_path.exists() and run_path.stat().st_size:
                    read_settings(run_path)  # what is not a run's own is not written over
                write_atomically(run_path, (json.dumps(run, indent=1) + "\n").encode())
            self.done = self._keep_whole_units()
        except OSError as error:
            raise ValueError(f"{folder}: cannot be written ({error.strerror})") from error

    def _check_same_run(self, path: Path, run: dict) -> None:
        before = read_settings(path)
        threads = [found.get("environment", {}).get("threads") for found in (before, run)]
        both = [
            *((key, before["config"].get(key), value) for key, value in run["config"].items()),
            *((key, before.get(key), run[key]) for key in SAME if key in run),
            ("threads", *threads),
        ]
        for key, old, new in both:
            if old != new:
                raise ValueError(
                    f"{path.parent}: must hold results of this run, with {key} {new!r}; got "
                    f"results with {key} {old!r}: choose another folder"
                )
        if before.get("version") != run.get("version"):
            raise ValueError(
                f"{path.parent}: must hold results of version {run.get('version')}, because "
                "figures of two versions are not mixed; got results of version "
                f"{before.get('version')}: choose another folder"
            )

    def _keep_whole_units(self) -> set[str]:
        if not self.path.exists():
            return set()
        records = list(read_lines(self.path, allow_cut=True))
        wrong = [r for r in records if not isinstance(r, dict) or not is_line(r)]
        if wrong:
            raise ValueError(f"{self.path}: must hold records of units; got {wrong[0]!r:.60}")
        done = {r["done"] for r in records if "done" in r}
        whole = [r for r in records if r.get("done", r.get("unit")) in done]
        if len(whole) < len(records) or not self.path.read_bytes().endswith(b"\n"):
            write_atomically(self.path, "".join(json.dumps(r) + "\n" for r in whole).encode())
        return done

    @contextlib.contextmanager
    def begun(self) -> Iterator[None]:
        """What fails before a unit is done leaves nothing behind."""
        try:
            yield
        except BaseException:
            if not self.done:
                with contextlib.suppress(OSError):
                    self.path.unlink(missing_ok=True)
                    (self.path.parent / RUN).unlink(missing_ok=True)
            raise

    def write(self, unit: str, records: list[dict], input_hash: str | None = None) -> None:
        """All records of a unit, and a hash of the text or prompt that it judged.

        ValueError when there is no room; what was half written is taken away again.
        """
        lines = [json.dumps({"unit": unit, **record}) for record in records]
        lines.append(json.dumps({"done": unit, "input": input_hash}))
        before = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "a") as file:
                file.write("".join(line + "\n" for line in lines))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):  # else it is dropped when the run continues
                os.truncate(self.path, before)
            raise ValueError(
                f"{self.path}: cannot be written ({error.strerror}): finished units are kept; run "
                "the same command again to continue"
            ) from error
        self.done.add(unit)


def is_line(record: dict) -> bool:
    """Whether it belongs to a unit, or ends one."""
    return isinstance(record.get("done", record.get("unit")), str)


def is_begun(folder: Path) -> bool:
    """Whether a run wrote settings and records: settings alone bind no other run."""
    return (folder / RUN).exists() and (folder / RECORDS).exists()


def read_settings(path: Path) -> dict:
    """Return what `run.json` holds; raise ValueError for another file."""
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: must be JSON; got another text ({error})") from error
    if not (isinstance(found, dict) and isinstance(found.get("config"), dict)):
        raise ValueError(f"{path}: must be a file that `saap eval` wrote; got one without config")
    environment = found.get("environment", {})
    if not isinstance(environment, dict):
        raise ValueError(f"{path}: environment must be a mapping; got another value")
    if not isinstance(environment.get("packages") or {}, dict):
        raise ValueError(f"{path}: packages must be a mapping; got another value")
    units = found.get("units", {})
    if not isinstance(units, dict) or not all(
        is_count(n) and name.rpartition("/")[2].isdecimal() for name, n in units.items()
    ):
        raise ValueError(f"{path}: units must be numbers by task and context; got others")
    rows = found.get("attention_rows", {})
    if not isinstance(rows, dict) or not all(map(is_layout, rows.values())):
        raise ValueError(
            f"{path}: attention_rows must have numbers of rows, {', '.join(LAYOUT)}, for each "
            "context; got others"
        )
    return found


def is_layout(rows) -> bool:
    return isinstance(rows, dict) and all(is_count(rows.get(name)) for name in LAYOUT)


def read_lines(path: Path, *, allow_cut: bool = False) -> Iterator[dict]:
    """The objects of a JSONL file. `allow_cut` drops a last line that was half written."""
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except (ValueError, RecursionError):
            if number < len(lines):
                raise ValueError(
                    f"{path}: line {number} of {len(lines)} must be JSON; got another text: the "
                    "file was damaged after `saap eval` wrote it"
                ) from None
            if allow_cut:
                return
            raise ValueError(
                f"{path}: line {number} must be JSON; got a part of a line: the run was cut "
                "short, "
                "run `saap eval` again with the same options to complete it"
            ) from None


def read_run(folder: Path) -> tuple[dict, list[dict]]:
    """`run.json` and the records of a result folder."""
    for name in (RUN, RECORDS):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder}: must be a folder that `saap eval` wrote; got one without {name}"
            )
    run = read_settings(folder / RUN)
    lines = read_lines(folder / RECORDS)
    records = [r for r in lines if not (isinstance(r, dict) and "done" in r)]
    if not records:
        raise ValueError(f"{folder / RECORDS}: must hold at least one unit; got none")
    check_records(folder / RECORDS, records)
    return run, records


def missing_units(folder: Path) -> dict[str, tuple[int, int]]:
    """By task and context, `attention/8192`: units that are there, and how many were to be; only
    where some are missing."""
    planned = read_settings(folder / RUN).get("units", {})
    done = Counter(str(r["done"]).rpartition("/")[0] for r in ends_of_units(folder))
    return {name: (done[name], n) for name, n in planned.items() if done[name] < n}


def read_inputs(folder: Path) -> dict[str, str]:
    """The hash of what each finished unit judged, where it was written down."""
    return {str(r["done"]): r["input"] for r in ends_of_units(folder) if r.get("input")}


def ends_of_units(folder: Path) -> list[dict]:
    """What stands behind the records of each finished unit."""
    return [r for r in read_lines(folder / RECORDS) if isinstance(r, dict) and "done" in r]
