"""`saap index`, `ask`, `generate`: read once, asked often; bad input is told in one line."""

import pytest

from saap.eval import reference

from .test_cli import bad, run_cli
from .test_generate import random_index


@pytest.fixture(scope="module")
def files(reference_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("decode")
    random_index(reference_model).save(folder / "index.safetensors")
    random_index(reference_model, nlist=4).save(folder / "other.safetensors")
    text = reference.split_held_out()[1]
    (folder / "document.txt").write_bytes(text[:900])
    (folder / "empty.txt").write_text("")
    (folder / "one.txt").write_text("x")
    return folder


@pytest.fixture(scope="module")
def context(files):
    import typer.testing

    from saap.eval.cli import app

    done = typer.testing.CliRunner().invoke(
        app,
        ["index", "reference", str(files / "document.txt"), "--index",
         str(files / "index.safetensors"), "--out", str(files / "context.safetensors")],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "901 tokens" in done.output
    (files / "cut.safetensors").write_bytes((files / "context.safetensors").read_bytes()[:-9])
    return files


def test_ask_answers_as_generate_does(context, monkeypatch, capsys):
    def answer(*arguments):
        code, out, err = run_cli(monkeypatch, capsys, *arguments, "--tokens", 12)
        assert (code, err) == (0, "")
        return out

    asked = answer(
        "ask", "reference", context / "context.safetensors", "\ndef main(", "--nprobe", 8
    )
    assert "of the cache visited" in asked
    assert "100.0%" in asked
    prompt = context / "prompt.txt"
    prompt.write_bytes((context / "document.txt").read_bytes() + b"\ndef main(")
    index = ("--index", context / "index.safetensors")
    out = answer(
        "generate", "reference", *index, "--prompt-file", prompt, "--nprobe", 8, "--compare"
    )
    assert asked.split("\nsaap:")[0] == out.split("\nsaap:")[0]
    assert "same tokens: the first 12 of 12" in out
    few = ("--max-tokens", 64)
    small = answer("ask", "reference", context / "context.safetensors", "\ndef main(", *few)
    assert "100.0%" not in small


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        bad(["ask", "reference", "none", "why"], "none: no such file; accepted is one that"),
        bad(["ask", "reference", "CUT", "why"], "truncated or not a safetensors file"),
        bad(["ask", "reference", "INDEX", "why"], "but not one that `saap index` wrote"),
        bad(["ask", "reference", "CONTEXT", ""], "question '': accepted is a text"),
        bad(["ask", "reference", "CONTEXT", "x", "--index", "OTHER"], "made with another index"),
        bad(["ask", "reference", "CONTEXT", "x", "--nprobe", "9"], "accepted are 1 to nlist=8"),
        bad(["ask", "reference", "CONTEXT", "x", "--top-p", "2"], "accepted are 0 < top_p <= 1"),
        bad(["index", "reference", "EMPTY", "--index", "INDEX"], "the corpus is empty"),
        bad(["index", "reference", "DOC", "--index", "none"], "none: no such file"),
        bad(
            ["generate", "reference", "--index", "INDEX", "--prompt-file", "none.txt"],
            "none.txt: no such file or folder",
        ),
    ],
)
def test_bad_input(context, monkeypatch, capsys, tmp_path, arguments, message):
    names = {"CUT": "cut.safetensors", "INDEX": "index.safetensors", "EMPTY": "empty.txt",
             "CONTEXT": "context.safetensors", "OTHER": "other.safetensors",
             "DOC": "document.txt"}  # fmt: skip
    arguments = [context / names[a] if a in names else a for a in arguments]
    if arguments[0] == "index":
        arguments += ["--out", tmp_path / "out"]
    code, _, err = run_cli(monkeypatch, capsys, *arguments)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
