"""Random command lines: exit code 0, 1 or 2, and what is wrong in one line; no traceback."""

import contextlib
import io
import sys

import pytest

from saap.eval import corpus
from saap.eval.cli.app import main

from .hostile import cases

COMMANDS = {
    "demo": ["--out", "--context", "--model", "--seed"],
    "train": ["--corpus", "--out", "--context", "--texts", "--nlist", "--router", "--window",
              "--steps", "--device", "--dtype", "--text-field", "--seed"],
    "eval": ["--out", "--index", "--methods", "--contexts", "--budgets", "--answer-budgets",
             "--tasks", "--corpus", "--share", "--texts", "--prompts", "--sweep", "--build",
             "--search", "--jobs", "--threads", "--seed"],
    "report": ["--strict"],
    "compare": ["--level", "--all"],
    "prefill": ["--out", "--index", "--method", "--chunk"],
    "index": ["--out", "--index", "--chunk"],
    "ask": ["--index", "--tokens", "--max-tokens", "--nprobe", "--top-p", "--min-weight"],
    "generate": ["--prompt-file", "--index", "--method", "--compare", "--tokens"],
    "info": ["--router", "--plot"],
}  # fmt: skip
NEEDED = {"train": ["--corpus", "--out"], "eval": ["--out"], "prefill": ["--out"],
          "index": ["--out"], "generate": ["--prompt-file"]}  # fmt: skip
VALUES = ("0", "-1", "1", "2", "512", str(2**70), "0.05", "1e999", "nan", "x", "", " ", "all",
          "dense", "saap,quest", "attention", "reference", "doc.txt", "docs", "bad.st", "none",
          "out", "file/x", "n" * 300, "../..", "/dev/null", "a.b=c", "saap.x=1", "=", 
          "\udcff", "sweep.yaml", "blend", "mlp", "out.png", "doc.txt,doc.txt",
          "[x]", "bytes.bin")  # fmt: skip


PLACES = {"demo": 0, "compare": 2, "prefill": 2, "index": 2, "ask": 3}  # others: 1
NUMBERS = {"--context", "--seed", "--texts", "--nlist", "--window", "--steps", "--prompts",
           "--jobs", "--threads", "--level", "--chunk", "--tokens", "--max-tokens", "--nprobe",
           "--top-p", "--min-weight"}  # fmt: skip


class Reached(ValueError):
    """A model would be loaded now: all arguments were accepted."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    for name, content in {
        "doc.txt": b"some words\n" * 50, "docs/a.txt": b"other words\n" * 50, "file": b"",
        "bad.st": b"\x10\0\0\0\0\0\0\0{}", "sweep.yaml": b"methods: [dense]\nseed: [1]\n",
        "bytes.bin": bytes(range(256)), "--out": b"a name like an option",
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)

    def reached(*_, **__):
        raise Reached("a model would be loaded")

    for name in ("load_model", "load_tokenizer"):
        monkeypatch.setattr(f"saap.hf.{name}", reached)
    monkeypatch.setattr(corpus, "read_dataset", reached)
    monkeypatch.setitem(corpus.CORPORA, "prose", ())
    return tmp_path


def arguments(own) -> list[str]:
    command = own.choice(sorted(COMMANDS))
    count = PLACES.get(command, 1) if own.random() < 0.9 else own.randrange(4)
    found = [command, *(own.choice(VALUES) for _ in range(count))]
    names = [own.choice(COMMANDS[command]) for _ in range(own.choice((0, 1, 2, 4)))]
    if own.random() < 0.9:
        names += NEEDED.get(command, [])
    for name in names:
        found.append(name)
        if name not in ("--strict", "--all", "--compare"):
            numbers = name in NUMBERS and own.random() < 0.9
            found.append(own.choice(VALUES[:6] if numbers else VALUES))
    return found


def test_command_lines(folder, monkeypatch):
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    for own, counts in cases("command lines", 60):
        given = arguments(own)
        out, err = io.StringIO(), io.StringIO()
        monkeypatch.setattr(sys, "argv", ["saap", *given])
        streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
        with streams[0], streams[1], pytest.raises(SystemExit) as stop:
            main()
        told = err.getvalue()
        assert stop.value.code in (0, 1, 2), (given, told)
        assert "Traceback" not in told, (given, told)
        lines = [line for line in told.splitlines() if line.startswith("saap: ")]
        usage = "Usage: " in told
        assert stop.value.code == 0 or usage or lines, (given, told)
        counts["usage"] = counts.get("usage", 0) + usage
        counts["accepted"] = counts.get("accepted", 0) + ("a model would be loaded" in told)
        for path, content in before.items():
            assert path.read_bytes() == content, (given, path)
