"""`saap prefill`, `ask`, `generate`: read once, asked often; bad input is told in one line."""

import pytest

from saap import context_file
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

    from saap.eval.cli.app import app

    done = typer.testing.CliRunner().invoke(
        app,
        ["prefill", "reference", str(files / "document.txt"), "--index",
         str(files / "index.safetensors"), "--out", str(files / "context.safetensors")],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "901 tokens" in " ".join(done.output.split())  # a long path breaks the line
    (files / "cut.safetensors").write_bytes((files / "context.safetensors").read_bytes()[:-9])
    return files


def test_ask_answers_as_generate_does(context, monkeypatch, capsys):
    def answer(*arguments):
        code, out, err = run_cli(monkeypatch, capsys, *arguments, "--tokens", 12)
        assert (code, err) == (0, "")
        return out

    asked = answer(
        "ask", "reference", context / "context.safetensors", "\ndef main(", "--max-tokens", 9999
    )
    assert "of the cache visited" in asked
    assert "100.0%" in asked
    prompt = context / "prompt.txt"
    prompt.write_bytes((context / "document.txt").read_bytes() + b"\ndef main(")
    index = ("--index", context / "index.safetensors")
    out = answer(
        "generate", "reference", *index, "--prompt-file", prompt, "--max-tokens", 9999, "--compare"
    )
    assert asked.split("\nsaap:")[0] == out.split("\nsaap:")[0]
    assert "same tokens: the first 12 of 12" in out
    few = ("--max-tokens", 64)
    small = answer("ask", "reference", context / "context.safetensors", "\ndef main(", *few)
    assert "100.0%" not in small


def test_lossless_has_the_tokens_of_dense(context, monkeypatch, capsys):
    code, out, err = run_cli(
        monkeypatch, capsys, "generate", "reference", "--prompt-file", context / "document.txt",
        "--method", "streaming", "--max-tokens", 0, "--tokens", 12, "--lossless", "--compare",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "tokens per verification" in out
    assert "same tokens: the first 12 of 12" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        bad(
            ["generate", "reference", "--prompt-file", "DOC", "--lossless", "--drafts", "0"],
            "verify must be an integer of at least 1; got 0",
        ),
        bad(["ask", "reference", "none", "why"], "none: must be a file that"),
        bad(["ask", "reference", "CUT", "why"], "must be a whole safetensors file"),
        bad(
            ["ask", "reference", "INDEX", "why"],
            "must be a file that `saap prefill` wrote; got another",
        ),
        bad(["ask", "reference", "CONTEXT", ""], "question must be a text"),
        bad(["ask", "reference", "CONTEXT", "x", "--index", "OTHER"], "made with another index"),
        bad(
            ["ask", "reference", "CONTEXT", "x", "--nprobe", "9"],
            "follows max_tokens and min_weight; got nprobe=9",
        ),
        bad(
            ["ask", "reference", "CONTEXT", "x", "--top-p", "2"],
            "top_p must be above 0 and at most 1",
        ),
        bad(["ask", "reference", "CONTEXT", "x", "--max-tokens", str(2**70)], "max_tokens must"),
        bad(["ask", "reference", "CONTEXT", "x", "--nprobe", str(2**70)], "nprobe must"),
        bad(["ask", "reference", "CONTEXT", "x", "--tokens", "0"], "--tokens must be at least 1"),
        bad(["ask", "reference", "CONTEXT", "x", "--tokens", str(2**70)], "--tokens must be at"),
        bad(["prefill", "reference", "DOC", "--chunk", "0"], "--chunk must be at least 1; got 0"),
        bad(
            ["prefill", "reference", "DOC", "--kv-dtype", "int4"],
            "kv_dtype must be one of float32, bfloat16, float16, int8; got 'int4'",
        ),
        bad(["generate", "reference", "--prompt-file", "DOC", "--tokens", "-3"], "got -3"),
        bad(
            ["prefill", "reference", "EMPTY", "--index", "INDEX"],
            "must hold text; got none",
        ),
        bad(
            ["prefill", "reference", "DOC", "--index", "none"],
            "none: must be a file that `saap train` wrote; got no such file",
        ),
        bad(
            ["generate", "reference", "--index", "INDEX", "--prompt-file", "none.txt"],
            "none.txt: must be a text file, a folder",
        ),
    ],
)
def test_bad_input(context, monkeypatch, capsys, tmp_path, arguments, message):
    names = {"CUT": "cut.safetensors", "INDEX": "index.safetensors", "EMPTY": "empty.txt",
             "CONTEXT": "context.safetensors", "OTHER": "other.safetensors",
             "DOC": "document.txt"}  # fmt: skip
    arguments = [context / names[a] if a in names else a for a in arguments]
    if arguments[0] == "prefill":
        arguments += ["--out", tmp_path / "out"]
    code, _, err = run_cli(monkeypatch, capsys, *arguments)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_context_is_held_and_asked_as_narrow_as_it_was_read(files, monkeypatch, capsys):
    sizes = {}
    for name in ("float32", "float16"):
        out = files / f"{name}.safetensors"
        document = files / "document.txt"
        code, _, err = run_cli(
            monkeypatch, capsys, "prefill", "reference", document, "--out", out, "--kv-dtype", name
        )
        assert (code, err) == (0, "")
        sizes[name] = out.stat().st_size
        code, said, err = run_cli(
            monkeypatch, capsys, "ask", "reference", out, "\ndef main(", "--tokens", 4
        )
        assert (code, err) == (0, "")
        assert "of the cache visited" in said
    assert sizes["float16"] < 0.6 * sizes["float32"]


def test_the_old_name_of_prefill_warns(context, monkeypatch, capsys, tmp_path):
    out = tmp_path / "out.saap"
    code, told, err = run_cli(
        monkeypatch, capsys, "index", "reference", context / "document.txt",
        "--index", context / "index.safetensors", "--out", out,
    )  # fmt: skip
    assert code == 0
    assert err.strip() == "saap: `saap index` is now `saap prefill`; the old name goes in 0.2"
    assert out.read_bytes() == (context / "context.safetensors").read_bytes()
    assert "901 tokens" in told


def test_a_prompt_is_read_sparsely_and_says_so(files, monkeypatch, capsys):
    long = files / "long.txt"
    long.write_bytes(reference.split_held_out()[1][:3500])
    out_file = files / "sparse.safetensors"
    code, out, err = run_cli(
        monkeypatch, capsys, "prefill", "reference", long, "--out", out_file,
        "--prefill-visited", 0.2,
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "of the rows visited to read them" in out
    assert context_file.read(out_file)[0]["prefill_visited"] == 0.2
    code, _, err = run_cli(
        monkeypatch, capsys, "generate", "reference", "--prompt-file", long,
        "--prefill-visited", 0.2, "--tokens", 2,
    )  # fmt: skip
    assert (code, err) == (0, "")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--prefill-visited", 0), "--prefill-visited must be above 0 and at most 1; got 0.0"),
        (("--prefill-visited", 1.5), "at most 1; got 1.5"),
        (("--prefill-visited", 0.1, "--lossless"), "must not be given beside --lossless"),
    ],
)
def test_a_wrong_share_is_refused(files, options, line, monkeypatch, capsys):
    prompt = ("--prompt-file", files / "document.txt")
    code, _, err = run_cli(monkeypatch, capsys, "generate", "reference", *prompt, *options)
    assert code == 2
    assert line in err
    assert err.count("\n") == 1
