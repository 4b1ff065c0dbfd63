"""Worker processes: the same results whatever their number; one that dies is told in one line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from saap.eval import reference
from saap.eval.run import EvalConfig, Source, Unit, plan, run_with_workers
from saap.eval.workers import Crew, crew_for, results, total_memory, usable_cores

from .test_cli import run_cli
from .units_of_work import bad_type, bad_value, kill_itself, nothing, own_process, slow_first

pytestmark = pytest.mark.many_steps


def test_results_come_in_order():
    assert list(results(nothing, slow_first, [0, 1, 2, 3], Crew(2, 1))) == [0, 1, 2, 3]
    assert list(results(nothing, slow_first, [], Crew(2, 1))) == []


def test_units_run_in_other_processes_with_their_threads():
    before = os.environ.get("OMP_NUM_THREADS")
    ((process, threads),) = results(nothing, own_process, [0], Crew(1, 3))
    assert process != os.getpid()
    assert threads == "3"
    assert os.environ.get("OMP_NUM_THREADS") == before


def test_a_worker_that_dies_is_told():
    found = results(nothing, kill_itself, [0, 1, 2, 3], Crew(1, 1))
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(
        ChildProcessError, match=r"died \(SIGKILL, most often .* memory\) at 2: fin"
    ):
        next(found)


def test_errors_of_users_stay_errors_of_users():
    with pytest.raises(ValueError, match=r"^7: must be no unit; got one$"):
        list(results(nothing, bad_value, [7], Crew(1, 1)))
    with pytest.raises(RuntimeError, match=r"Traceback(.|\n)*TypeError"):
        list(results(nothing, bad_type, [7], Crew(1, 1)))


def test_workers_end_with_their_parent(tmp_path):
    """A killed parent leaves no process behind that goes on computing."""
    code = (
        "from saap.eval.workers import Crew, results\n"
        "from tests.units_of_work import nothing, forever\n"
        "if __name__ == '__main__': list(results(nothing, forever, [PATH], Crew(1, 1)))"
    ).replace("PATH", repr(str(tmp_path / "pid")))
    script = tmp_path / "parent.py"
    script.write_text(code)
    root = os.path.dirname(os.path.dirname(__file__))
    parent = subprocess.Popen([sys.executable, script], env={**os.environ, "PYTHONPATH": root})
    try:
        worker = wait_for(lambda: int((tmp_path / "pid").read_text()))
    finally:
        parent.kill()
        parent.wait()
    try:
        wait_for(lambda: is_gone(worker))
    except ValueError:
        os.kill(worker, signal.SIGKILL)
        raise


def is_gone(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            if file.read().split()[2] != "Z":
                raise ValueError(f"process {pid} runs")
    except FileNotFoundError:
        pass
    return True


def wait_for(attempt, seconds=60):
    end = time.monotonic() + seconds
    while True:
        try:
            return attempt()
        except (OSError, ValueError):
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def test_threads_follow_from_the_machine_alone():
    cores = usable_cores()
    assert crew_for(1) == Crew(cores, 1)
    assert crew_for(1, jobs=1).threads == crew_for(1, jobs=7).threads == 1
    assert crew_for(total_memory()) == Crew(1, cores)
    assert crew_for(1, threads=cores) == Crew(1, cores)
    with pytest.raises(ValueError, match="jobs must be at least 1; got 0"):
        crew_for(1, jobs=0)


def test_timed_units_come_last():
    config = EvalConfig(methods=("dense",), contexts=(512, 1024), tasks=("speed", "attention"),
                        n_texts=1)  # fmt: skip
    assert plan(config) == [
        Unit("attention", 512, 0), Unit("attention", 1024, 0), Unit("speed", 512, 0),
        Unit("speed", 1024, 0),
    ]  # fmt: skip


CONFIG = EvalConfig(
    methods=("dense", "streaming", "hnsw"), contexts=(384,), budgets=(0.3,), n_texts=2,
    n_queries=4, answer_budgets=(0.3,), n_prompts=1, n_distractors=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers") / "two"
    run_with_workers(source(), CONFIG, folder, jobs=2, threads=1)
    return folder


def source():
    return Source(reference.FOLDER, None, reference.split_held_out()[1], "reference")


def test_records_do_not_depend_on_the_number_of_workers(by_two, tmp_path):
    seen = []
    run_with_workers(source(), CONFIG, tmp_path, jobs=1, threads=1,
                     progress=lambda *told: seen.append(told))  # fmt: skip
    for name in ("run.json", "records.jsonl"):
        assert (tmp_path / name).read_bytes() == (by_two / name).read_bytes()
    assert seen[0] == ("start", 0, 3 * 384)
    assert seen[-1] == ("passkey at 384", 3 * 384, 3 * 384)


def test_a_finished_run_has_nothing_left_to_do(by_two):
    before = (by_two / "records.jsonl").read_bytes()
    seen = []
    run_with_workers(source(), CONFIG, by_two, progress=lambda *told: seen.append(told))
    assert seen == [("nothing is left to do", 0, 0)]
    assert (by_two / "records.jsonl").read_bytes() == before


def test_a_run_keeps_its_threads(by_two):
    assert json.loads((by_two / "run.json").read_text())["environment"]["threads"] == 1
    with pytest.raises(
        ValueError, match="results of this run, with threads 2; got results with threads 1"
    ):
        run_with_workers(source(), CONFIG, by_two, threads=2)


def test_another_text_is_another_run(by_two):
    other = Source(reference.FOLDER, None, b"other words " * 4000, "reference")
    with pytest.raises(ValueError, match="must hold results of this run, with text"):
        run_with_workers(other, CONFIG, by_two)


def test_another_version_is_another_run(by_two, tmp_path):
    copied = shutil.copytree(by_two, tmp_path / "copied")
    run = json.loads((copied / "run.json").read_text())
    (copied / "run.json").write_text(json.dumps({**run, "version": "0.0.1+00000000"}))
    before = contents(copied)
    with pytest.raises(ValueError, match=r"got results of version 0\.0\.1.00000000"):
        run_with_workers(source(), CONFIG, copied)
    assert contents(copied) == before


def test_a_half_written_line(monkeypatch, capsys, by_two, tmp_path):
    whole = (by_two / "records.jsonl").read_bytes()
    copied = shutil.copytree(by_two, tmp_path / "copied")
    (copied / "records.jsonl").write_bytes(whole[: whole.index(b'{"done"') + 300])
    before = contents(copied)
    code, _, err = run_cli(monkeypatch, capsys, "report", copied)
    assert code == 2
    assert "the run was cut short, run `saap eval` again" in err
    assert contents(copied) == before
    run_with_workers(source(), CONFIG, copied, jobs=1)
    assert (copied / "records.jsonl").read_bytes() == whole


def test_a_damaged_line(by_two, tmp_path):
    copied = shutil.copytree(by_two, tmp_path / "copied")
    lines = (copied / "records.jsonl").read_text().splitlines(keepends=True)
    (copied / "records.jsonl").write_text("".join([lines[0], lines[1][:40] + "\n", *lines[2:]]))
    before = contents(copied)
    with pytest.raises(
        ValueError, match=r"line 2 of .* must be JSON; got another text: the file was damaged"
    ):
        run_with_workers(source(), CONFIG, copied)
    assert contents(copied) == before


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--jobs", "0"], "jobs must be at least 1; got 0"),
        (["--threads", "-1"], "threads must be at least 1; got -1"),
        (["--contexts", "512,512"], "contexts must hold each value once; got 512 twice"),
    ],
)
def test_bad_crews(monkeypatch, capsys, tmp_path, options, message):
    out = tmp_path / "out"
    code, _, err = run_cli(
        monkeypatch, capsys, "eval", "reference", "--methods", "dense", *options, "--out", out
    )
    assert code == 2
    assert message in err
    assert not out.exists()
