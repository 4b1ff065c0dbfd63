"""Raw records: one JSON object a line, written before anything is scored, never edited after.

A run is a list of units of work. A unit's records are followed by `{"done": unit}`; records of a
unit that was cut short are dropped when the run continues.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

RECORDS, RUN = "records.jsonl", "run.json"


class RecordFile:
    """Appends the records of whole units to `folder/records.jsonl`."""

    def __init__(self, folder: Path, run: dict):
        self.path = folder / RECORDS
        run_path = folder / RUN
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if run_path.exists():
                self._check_same_run(run_path, run)
            else:
                run_path.write_text(json.dumps(run, indent=1) + "\n")
            self.done = self._keep_whole_units()
        except OSError as error:
            raise ValueError(f"{folder}: cannot be written ({error.strerror})") from error

    def _check_same_run(self, path: Path, run: dict) -> None:
        before = json.loads(path.read_text())
        for key, value in run["config"].items():
            if before["config"].get(key) != value:
                raise ValueError(
                    f"{path.parent} holds results of another run: its {key} is "
                    f"{before['config'].get(key)!r}, now {value!r}; choose another folder"
                )

    def _keep_whole_units(self) -> set[str]:
        if not self.path.exists():
            return set()
        records = list(read_lines(self.path, allow_cut=True))
        done = {r["done"] for r in records if "done" in r}
        whole = [r for r in records if r.get("done", r.get("unit")) in done]
        if len(whole) < len(records) or not self.path.read_bytes().endswith(b"\n"):
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(r) + "\n" for r in whole))
            os.replace(temporary, self.path)
        return done

    def write(self, unit: str, records: list[dict]) -> None:
        lines = [json.dumps({"unit": unit, **record}) for record in records]
        lines.append(json.dumps({"done": unit}))
        with open(self.path, "a") as file:
            file.write("".join(line + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        self.done.add(unit)


def read_lines(path: Path, *, allow_cut: bool = False) -> Iterator[dict]:
    """The objects of a JSONL file; a line that is no JSON is an error, or the end if allowed."""
    with open(path) as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                if allow_cut:
                    return
                raise ValueError(
                    f"{path}: line {number} is not JSON: the run was cut short; run `saap eval` "
                    "again with the same options to complete it"
                ) from None


def read_run(folder: Path) -> tuple[dict, list[dict]]:
    """`run.json` and the records of a result folder."""
    for name in (RUN, RECORDS):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder}: holds no {name}; accepted is a folder that `saap eval` wrote"
            )
    run = json.loads((folder / RUN).read_text())
    records = [r for r in read_lines(folder / RECORDS) if "done" not in r]
    return run, records
