"""What commands do to files: inputs are never overwritten, disks fill up, two runs meet."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from saap.eval.claims import claimed
from saap.eval.records import RECORDS, RUN, RecordFile, read_lines
from saap.eval.report import page
from saap.eval.report.plots import plt, save

from .test_cli import bad, index_file, run_cli

__all__ = ["index_file"]  # the fixture

ROOT = Path(__file__).parent.parent
SETTINGS = {"config": {"seed": 1}, "environment": {"threads": 1}}


def refused(monkeypatch, capsys, *arguments):
    """The one line of a command that ends before it has loaded a model."""

    def loaded(*_, **__):
        raise AssertionError("a model was loaded before the arguments were checked")

    monkeypatch.setattr("saap.hf.load_model", loaded)
    code, _, err = run_cli(monkeypatch, capsys, *arguments)
    assert code == 2, err
    assert err.startswith("saap: ")
    assert len(err.strip().splitlines()) == 1, err
    return err


@pytest.mark.parametrize(
    ("arguments", "out"),
    [
        bad(["prefill", "reference", "doc.txt", "--out", "doc.txt"], "doc.txt"),
        bad(["prefill", "reference", "doc.txt", "--out", "link.txt"], "doc.txt"),
        bad(["prefill", "reference", "doc.txt", "--out", "hard.txt"], "hard.txt"),
        bad(["prefill", "reference", "doc.txt", "--index", "my.st", "--out", "./my.st"], "my.st"),
        bad(["prefill", "m.gguf", "doc.txt", "--out", "m.gguf"], "m.gguf"),
        bad(["prefill", "model", "doc.txt", "--out", "model/config.json"], "model/config.json"),
        bad(["prefill", "reference", "docs", "--out", "docs/sub/a.txt"], "docs/sub/a.txt"),
        bad(["train", "reference", "--corpus", "doc.txt", "--out", "doc.txt"], "doc.txt"),
        bad(["train", "reference", "--corpus", "docs", "--out", "docs/sub/a.txt"], "sub/a.txt"),
        bad(["info", "my.st", "--plot", "my.st"], "my.st"),
        bad(["eval", "reference", "--corpus", "old/records.jsonl", "--out", "old"], "records.j"),
        bad(["eval", "reference", "--index", "old/report.html", "--out", "old"], "report.html"),
        bad(["eval", "reference", "--sweep", "old/run.json", "--out", "old"], "run.json"),
        bad(["eval", "reference", "--corpus", "docs", "--out", "docs"], "docs"),
    ],
)
def test_an_output_that_is_an_input(monkeypatch, capsys, tmp_path, index_file, arguments, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs/sub").mkdir(parents=True)
    (tmp_path / "old").mkdir()
    (tmp_path / "model").mkdir()
    for name in ("doc.txt", "docs/sub/a.txt", "docs/report.html", "m.gguf", "old/report.html",
                 "old/records.jsonl", "old/run.json", "model/config.json"):  # fmt: skip
        (tmp_path / name).write_text(f"the only copy of {name}")
    (tmp_path / "my.st").write_bytes(index_file.read_bytes())
    (tmp_path / "link.txt").symlink_to("doc.txt")
    os.link(tmp_path / "doc.txt", tmp_path / "hard.txt")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    err = refused(monkeypatch, capsys, *arguments)
    assert "must be another" in err
    assert out in err
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_an_index_in_the_folder_of_its_corpus_may_be_trained_again(
    monkeypatch, capsys, tmp_path, index_file
):
    (tmp_path / "a.txt").write_text("too short")
    (tmp_path / "index.st").write_bytes(index_file.read_bytes())
    code, _, err = run_cli(
        monkeypatch, capsys, "train", "reference", "--corpus", tmp_path,
        "--out", tmp_path / "index.st",
    )  # fmt: skip
    assert code == 2
    assert "of one text; got" in err  # what it was refused for is the text


@pytest.mark.parametrize("out", ["file/x.saap", "n" * 250])
@pytest.mark.parametrize("command", ["prefill", "train", "eval"])
def test_an_output_that_cannot_be_written_is_refused_first(
    monkeypatch, capsys, tmp_path, command, out
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "doc.txt").write_text("words\n" * 100)
    given = {
        "prefill": ["reference", "doc.txt"],
        "train": ["reference", "--corpus", "doc.txt"],
        "eval": ["reference"],
    }
    if command == "eval":
        out = out.replace("n" * 250, "n" * 256)  # a folder has its name and no other
    err = refused(monkeypatch, capsys, command, *given[command], "--out", out)
    assert "cannot be written" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["doc.txt", "file"]


@contextlib.contextmanager
def full_disk(n_bytes: int):
    """Files that this process writes end after so many bytes, as on a disk without room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_settings_on_a_full_disk(tmp_path):
    with full_disk(20), pytest.raises(ValueError, match="cannot be written"):
        RecordFile(tmp_path, {**SETTINGS, "model": "m" * 100})
    assert not list(tmp_path.iterdir())
    RecordFile(tmp_path, {**SETTINGS, "model": "m" * 100})
    assert json.loads((tmp_path / RUN).read_text())["config"] == {"seed": 1}


def test_empty_settings_of_an_older_version_are_written_again(tmp_path):
    (tmp_path / RUN).write_text("")
    RecordFile(tmp_path, SETTINGS)
    assert json.loads((tmp_path / RUN).read_text())["config"] == {"seed": 1}
    (tmp_path / RUN).write_text("")
    (tmp_path / RECORDS).write_text('{"done": "a"}\n')
    with pytest.raises(ValueError, match="must be JSON"):
        RecordFile(tmp_path, SETTINGS)


def test_records_on_a_full_disk(tmp_path):
    records = RecordFile(tmp_path, SETTINGS)
    records.write("first", [{"task": "x", "value": "y" * 100}])
    with full_disk(300), pytest.raises(ValueError, match=r"records.jsonl: cannot be written \("):
        records.write("second", [{"task": "x", "value": "z" * 400}])
    assert "second" not in records.done
    assert (tmp_path / RECORDS).read_text().endswith('"input": null}\n')
    again = RecordFile(tmp_path, SETTINGS)
    assert again.done == {"first"}
    again.write("second", [{"task": "x", "value": "z" * 400}])
    lines = read_lines(tmp_path / RECORDS)
    assert [r["done"] for r in lines if "done" in r] == ["first", "second"]


def test_a_picture_on_a_full_disk(tmp_path):
    path = tmp_path / "map.png"
    path.write_bytes(b"the picture before")
    with full_disk(500), pytest.raises(ValueError, match=r"map.png: cannot be written \("):
        save(plt.subplots()[0], path)
    assert [p.name for p in tmp_path.iterdir()] == ["map.png"]
    assert path.read_bytes() == b"the picture before"


def test_a_disk_that_fills_up_anywhere_is_one_line(monkeypatch, capsys, tmp_path):
    def full(folder):
        raise OSError(28, "No space left on device", str(folder / "scores.png"))

    monkeypatch.setattr(page, "make_report", full)
    code, _, err = run_cli(monkeypatch, capsys, "report", tmp_path)
    assert code == 2
    assert err == (
        f"saap: {tmp_path / 'scores.png'}: cannot be read or written (No space left on device)\n"
    )


def test_two_runs_in_one_folder(monkeypatch, capsys, tmp_path):
    out = tmp_path / "out"
    with claimed(out):
        code, _, err = run_cli(
            monkeypatch, capsys, "eval", "reference", "--methods", "dense", "--out", out
        )
        assert code == 2
        assert err == (
            f"saap: {out}: must be used by one `saap eval` at a time; got another one, process "
            f"{os.getpid()}, at work in it\n"
        )
    assert not out.exists()


def test_a_killed_run_leaves_no_claim(tmp_path):
    code = "import os, sys; from pathlib import Path; from saap.eval.claims import claimed\n"
    code += "with claimed(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", code, tmp_path])
    assert done.returncode == -9
    with claimed(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def run_shell(line, **options):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, env=environment, cwd=ROOT, **options
    )


def test_standard_output_without_room(index_file):
    done = run_shell(f"python -m saap.eval.cli info {index_file} > /dev/full")
    assert done.returncode == 2
    assert done.stderr == "saap: output: cannot be written (No space left on device)\n"


@pytest.mark.parametrize(("second", "code"), [(0.5, 1), (0.99, 0)])
def test_compare_tells_its_verdict_to_head(tmp_path, second, code):
    for name, accuracy in (("a", 0.9), ("b", second)):
        file = RecordFile(tmp_path / name, {**SETTINGS, "version": "1"})
        for number in range(30):
            record = {"task": "passkey", "context": 512, "method": "saap", "budget": "0.05",
                      "accuracy": accuracy, "selectivity": 0.1, "bytes_read": 1,
                      "router_bytes": 1}  # fmt: skip
            file.write(f"passkey/{number}", [record])
    command = f"python -m saap.eval.cli compare --all {tmp_path}/a {tmp_path}/b"
    # `true` is gone before anything is written.
    done = run_shell(f"{command} | true; exit ${{PIPESTATUS[0]}}")
    assert (done.returncode, done.stderr) == (code, "")


def test_an_interrupt_while_workers_start_is_quiet(tmp_path):
    code = (
        "import os, signal, threading\n"
        "from saap.eval.workers import Crew, results\n"
        "from tests.units_of_work import nothing, forever\n"
        "if __name__ == '__main__':\n"
        # Shells start what runs in the background without it.
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "    send = lambda: os.killpg(os.getpgid(0), signal.SIGINT)\n"
        f"    threading.Timer(0.4, send).start()\n"
        f"    list(results(nothing, forever, [{str(tmp_path / 'pid')!r}], Crew(1, 1)))"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    parent = subprocess.Popen(
        [sys.executable, script], env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    started = time.monotonic()
    err = parent.communicate(timeout=240)[1]
    assert time.monotonic() - started < 200
    assert err.count("Traceback") == 1, err  # that of the script itself
    assert "units_of_work" not in err
