"""The command line: what a user gets wrong ends in one line, exit code 2, nothing half-written."""

import subprocess
import sys

import pytest

from saap.eval.cli import main


def run_cli(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["saap", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


@pytest.fixture(scope="module")
def index_file(tiny_index, tmp_path_factory):
    path = tmp_path_factory.mktemp("index") / "tiny.safetensors"
    tiny_index.save(path)
    return path


def bad(arguments, message):
    return pytest.param(arguments, message, id=message[:40])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        bad(["eval", "reference", "--methods", "sapp"], "did you mean 'saap'"),
        bad(["eval", "reference", "--contexts", "9000"], "context 9000: accepted are at most"),
        bad(["eval", "reference", "--contexts", "8k"], "accepted are numbers separated by commas"),
        bad(["eval", "reference", "--methods", "saap"], "needs a trained index: pass --index"),
        bad(["eval", "reference", "--index", "INDEX"], "was trained for another model"),
        bad(["eval", "reference", "--index", "no.safetensors"], "no such file"),
        bad(["eval", "reference", "--index", "CUT"], "truncated or not a safetensors file"),
        bad(["eval", "./nothing", "--methods", "dense"], "accepted is a folder with config.json"),
        bad(["eval", "reference", "--methods", "dense", "--budgets", "0.01"], "accepted is above"),
        bad(["train", "reference", "--corpus", "EMPTY"], "the corpus is empty"),
        bad(["train", "reference", "--corpus", "none.txt"], "no such file or folder"),
        bad(["train", "reference", "--corpus", "SHORT"], "lower nlist or bring more text"),
        bad(["train", "reference", "--corpus", "SHORT", "--context", "99999"], "accepted are at"),
        bad(["train", "reference", "--corpus", "SHORT", "--router", "tree"], "router='tree'"),
        bad(["train", "reference", "--corpus", "SHORT", "--out", "EMPTYDIR"], "a folder or"),
        bad(["train", "reference", "--corpus", "LINE"], "the corpus repeats itself"),
        bad(["train", "reference", "--corpus", "no/name"], "pip install datasets"),
        bad(["train", "reference", "--corpus", "SHORT", "--device", "tpu"], "accepted are cpu"),
        bad(["train", "reference", "--corpus", "SHORT", "--dtype", "int8"], "--dtype int8: acc"),
        bad(["info", "INDEX", "--router", "tree"], "--router tree: accepted are"),
        bad(["report", "EMPTYDIR"], "holds no run.json"),
        bad(["info", "EMPTY"], "truncated or not a safetensors file"),
        bad(["demo", "--context", "100000"], "context 100000: accepted are at most"),
    ],
)
def test_bad_input(monkeypatch, capsys, tmp_path, index_file, arguments, message):
    cut, empty, short = (tmp_path / name for name in ("cut", "empty.txt", "short.txt"))
    cut.write_bytes(index_file.read_bytes()[:-50])
    empty.write_text("")
    short.write_text("words and lines\n" * 40)
    line = tmp_path / "line.txt"
    line.write_text("the same line again\n" * 2000)
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "dir").mkdir()
    out = tmp_path / "out"
    places = {"INDEX": index_file, "CUT": cut, "EMPTY": empty, "SHORT": short, "LINE": line,
              "EMPTYDIR": tmp_path / "dir"}  # fmt: skip
    arguments = [places.get(a, a) for a in arguments]
    if arguments[0] in ("eval", "train", "demo") and "--out" not in arguments:
        arguments += ["--out", out]
    code, _, err = run_cli(monkeypatch, capsys, *arguments)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("saap: ")
    assert not list(out.glob("*.safetensors")) if out.is_dir() else not out.exists()
    assert not (out / "records.jsonl").exists()


def test_unwritable_output(monkeypatch, capsys, tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    code, _, err = run_cli(
        monkeypatch, capsys, "eval", "reference", "--methods", "dense", "--out", blocker / "x"
    )
    assert code == 2
    assert "cannot be written to" in err


def test_info_shows_recall_a_head(monkeypatch, capsys, index_file):
    code, out, _ = run_cli(monkeypatch, capsys, "info", index_file)
    assert code == 0
    assert "nlist 16" in out
    assert "held-out middle recall at nprobe 1 of 16" in out


def test_info_draws_a_picture(monkeypatch, capsys, index_file, tmp_path):
    picture = tmp_path / "map.png"
    code, out, _ = run_cli(
        monkeypatch, capsys, "info", index_file, "--router", "centroid", "--plot", picture
    )
    assert code == 0
    assert "nprobe 1 of 16, centroid" in out
    assert picture.is_file()


def test_help_is_quick_and_names_the_commands():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "saap.eval.cli", "--help"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    for command in ("demo", "train", "eval", "report", "info"):
        assert command in done.stdout
    assert " torch\n" not in done.stderr
