"""The command line: what a user gets wrong ends in one line, exit code 2, nothing half-written."""

import subprocess
import sys

import pytest

from saap import __version__
from saap.eval.cli.app import main


def run_cli(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["saap", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def test_all_methods_without_an_index_are_those_that_need_none(monkeypatch, capsys, tmp_path):
    """What is left out is told before the text turns out to be too short."""
    text = tmp_path / "short.txt"
    text.write_text("a short text")
    arguments = ["eval", "reference", "--corpus", text, "--out", tmp_path / "out"]
    code, out, err = run_cli(monkeypatch, capsys, *arguments)
    assert code == 2
    assert "but those that need an index (--index): kmeans, kmeans-cells" in out
    assert "must have at least 8192 tokens" in err
    assert not (tmp_path / "out").exists()


def test_version(monkeypatch, capsys):
    assert run_cli(monkeypatch, capsys, "--version") == (0, f"saap {__version__}\n", "")


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
        bad(
            ["eval", "reference", "--contexts", "9000"],
            "context must be at most the model's max_position_embeddings",
        ),
        bad(
            ["eval", "reference", "--contexts", "8k"],
            "must be numbers separated by commas; got '8k'",
        ),
        bad(
            ["eval", "reference", "--methods", "mlp"],
            "needs a trained index (`saap train`, --index",
        ),
        bad(["eval", "reference", "--index", "INDEX"], "the index must be trained for this model"),
        bad(["eval", "reference", "--index", "no.safetensors"], "no such file"),
        bad(["eval", "reference", "--index", "CUT"], "must be a whole safetensors file"),
        bad(["eval", "./nothing", "--methods", "dense"], "must be a folder with config.json"),
        bad(
            ["eval", "reference", "--methods", "dense", "--budgets", "0.003"],
            "selectivity must be above",
        ),
        bad(
            ["eval", "reference", "--methods", "dense", "--budgets", "0"], "budgets must be above"
        ),
        bad(
            [
                "eval",
                "reference",
                "--methods",
                "saap",
                "--contexts",
                "1024,256",
                "--budgets",
                "0.15",
            ],
            "sinks and window take 32 rows of 192; got 0.15",
        ),
        bad(
            ["eval", "reference", "--methods", "dense", "--contexts", "256", "--window", "200"],
            "window must leave rows to choose of a context of 192",
        ),
        bad(
            ["eval", "reference", "--methods", "dense", "--budgets", "0.1,0.1000000001"],
            "each method must be given once at each budget; got dense at 0.1 twice",
        ),
        bad(
            ["train", "reference", "--corpus", "EMPTY"],
            "must hold text; got none",
        ),
        bad(["train", "reference", "--corpus", "none.txt"], "got no such file or folder"),
        bad(["train", "reference", "--corpus", "SHORT"], "of one text; got"),
        bad(["train", "CUTGGUF", "--corpus", "SHORT"], "a GGUF file must hold what its beginning"),
        bad(["train", "EMPTYGGUF", "--corpus", "SHORT"], "must begin with b'GGUF'; got b''"),
        bad(
            ["train", "reference", "--corpus", "SHORT", "--context", "99999"],
            "--context must be at most",
        ),
        bad(
            ["train", "reference", "--corpus", "SHORT", "--router", "tree"],
            "router must be one of mlp, linear, centroid; got 'tree'",
        ),
        bad(["train", "reference", "--corpus", "SHORT", "--out", "EMPTYDIR"], "a folder or"),
        bad(["train", "reference", "--corpus", "LINE"], "it repeats itself, bring other text"),
        bad(["train", "reference", "--corpus", "no/name"], "pip install datasets"),
        bad(
            ["train", "reference", "--corpus", "SHORT", "--device", "tpu"],
            "--device must be cpu or cuda; got tpu",
        ),
        bad(
            ["train", "reference", "--corpus", "SHORT", "--dtype", "int8"],
            "--dtype must be one of float32",
        ),
        bad(["info", "INDEX", "--router", "tree"], "--router must be one of"),
        bad(["report", "EMPTYDIR"], "got one without run.json"),
        bad(["info", "EMPTY"], "must be a whole safetensors file"),
        bad(["info", "EMPTYDIR"], "wrote; got a folder"),
        bad(["demo", "--context", "100000"], "context must be at most the model's"),
        bad(["train", "reference", "--corpus", "SHORT", "--texts", "0"], "texts must be at least"),
        bad(["train", "reference", "--corpus", "SHORT", "--context", "0"], "context must be at l"),
        bad(["train", "reference", "--corpus", "n" * 300], "File name too long"),
        bad(["train", "n" * 300, "--corpus", "SHORT"], "n" * 300),
        bad(["info", "n" * 300], "File name too long"),
        bad(["report", "n" * 300], "File name too long"),
        bad(["info", "INDEX", "--plot", "map.xyz"], "must end in one of"),
        bad(["eval", "reference", "--threads", "0"], "threads must be at least 1; got 0"),
        bad(["eval", "reference", "--methods", "dense,dense"], "got 'dense' twice"),
        bad(["eval", "reference", "--methods", ","], "separated by commas, or 'all'; got ','"),
        bad(["eval", "reference", "--seed", "-1"], "Invalid value for '--seed'"),
        bad(["train", "reference", "--corpus", "SHORT", "--seed", "9" * 20], "--seed"),
        bad(["eval", "reference", "--no-such"], "No such option: --no-such"),
        bad(["eval", "reference", "--texts", "many"], "; see `"),
        bad(["demo", "--model", "reference", "--context", "512"], "; got 512: try 2048"),
        bad(
            "eval reference --methods dense --contexts 512 --tasks passkey".split(),
            "answer_budgets of passkey at 512 tokens: selectivity must be above 0.0625, because",
        ),
        bad(
            "train reference --corpus SHORT --seed -1".split(),
            "Invalid value for '--seed'",
        ),
        bad(
            (
                "eval reference --methods kmeans-online --build kmeans-online.rows_per_cluster=0"
            ).split(),
            "rows_per_cluster must be a whole number in 1..1073741824; got 0",
        ),
        bad(
            "eval reference --methods hnsw --build hnsw.neighbours=-3".split(),
            "neighbours must be a whole number in 2..1024; got -3",
        ),
        bad("eval reference --methods hnsw --search hnsw.ef=0".split(), "ef must be a whole num"),
        bad("eval reference --methods pq --build pq.dims=0".split(), "dims must be a whole numb"),
        bad(
            "eval reference --methods dense --search dense.max_tokens=4".split(),
            "dense visits everything: it must have no build and no search",
        ),
        bad(["train", "reference", "--corpus", "BYTES"], "must be text; got bytes that are none"),
        bad("advise reference --method dense".split(), "one that chooses rows and that a decoder"),
        bad("advise reference --method oracle-tokens".split(), "got 'oracle-tokens'"),
        bad(["generate", "reference", "--prompt-file", "SHORT", "--drafts", "4"], "--lossless"),
        bad(["explain", "reference", "--prompt-file", "SHORT", "--passage", " "], "got none"),
        bad(["explain", "reference", "--prompt-file", "SHORT", "--methods", "saap,saap"], "twice"),
        bad(["explain", "reference", "--prompt-file", "SHORT", "--methods", ""], "got ''"),
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
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\3")
    (tmp_path / "empty.gguf").write_bytes(b"")
    out = tmp_path / "out"
    (tmp_path / "bytes.txt").write_bytes(b"\x7fELF\0\1\2" * 100)
    places = {"INDEX": index_file, "CUT": cut, "EMPTY": empty, "SHORT": short, "LINE": line,
              "EMPTYDIR": tmp_path / "dir", "CUTGGUF": tmp_path / "cut.gguf",
              "EMPTYGGUF": tmp_path / "empty.gguf", "BYTES": tmp_path / "bytes.txt"}  # fmt: skip
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
    assert "cannot be written" in err


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


def test_a_picture_has_the_name_that_was_asked_for(monkeypatch, capsys, index_file, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run_cli(monkeypatch, capsys, "info", index_file, "--plot", "plot")
    assert code == 0
    assert "wrote plot\n" in out
    assert (tmp_path / "plot").read_bytes()[:4] == b"\x89PNG"
    assert [p.name for p in tmp_path.iterdir()] == ["plot"]


def test_help_is_quick_and_names_the_commands():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "saap.eval.cli", "--help"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    for command in ("demo", "train", "eval", "report", "info"):
        assert command in done.stdout
    assert " torch\n" not in done.stderr


def test_budgets_that_no_task_asks_at_are_not_checked(reference_model, reference_tokenizer):
    """512 tokens cannot keep 5 % with sinks and window: no matter where nothing is asked."""
    from saap.eval.run import EvalConfig, make_bench

    def bench(task):
        config = EvalConfig(methods=("dense",), contexts=(512,), budgets=(0.5,), tasks=(task,))
        return make_bench(reference_model, reference_tokenizer, None, b"text", config)

    assert bench("attention").config.tasks == ("attention",)
    assert bench("geometry").config.tasks == ("geometry",)
    with pytest.raises(ValueError, match="selectivity must be above"):
        bench("passkey")
