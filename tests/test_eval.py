"""Run, score, report: whole units, resumable, the right columns, one file that stands alone."""

import json
import re

import pytest

from saap.budget import Budget
from saap.eval import records as records_module
from saap.eval import reference
from saap.eval.checks import check_folder
from saap.eval.cli.app import main
from saap.eval.compare import compare
from saap.eval.records import RecordFile, read_run
from saap.eval.report.page import make_report
from saap.eval.run import EvalConfig, attention_rows, check_contexts, run
from saap.eval.scores import score_run
from saap.eval.tasks import passkey
from saap.eval.tasks.asking import prompts_of_tokens
from saap.eval.variants import make_variants
from saap.methods import METHODS

pytestmark = pytest.mark.many_steps

CONFIG = EvalConfig(
    methods=tuple(METHODS), contexts=(1024,), budgets=(0.1, 0.2), answer_budgets=(0.1,),
    n_texts=2, n_queries=8, n_prompts=2, n_distractors=2,
)  # fmt: skip
COLUMNS = {
    "method", "model", "task", "context", "budget", "selectivity", "recall_all", "recall_middle",
    "recall_of_oracle", "output_error", "needles_lost", "bytes_read", "router_bytes", "accuracy",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(reference_model, reference_tokenizer, reference_index, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    text = reference.split_held_out()[1]
    run(reference_model, reference_tokenizer, reference_index, text, CONFIG, folder,
        model_name="reference")  # fmt: skip
    return folder


def test_scores(finished):
    scores = score_run(finished)
    assert json.loads((finished / "scores.json").read_text()) == scores
    assert all(set(s) >= COLUMNS for s in scores)
    attention = {(s["method"], s["budget"]): s for s in scores if s["task"] == "attention"}
    assert len(attention) == 2 * len(METHODS)
    for (method, budget), score in attention.items():
        if method == "dense":
            assert score["selectivity"] == pytest.approx(1.0)
            assert score["recall_middle"] == pytest.approx(1.0, abs=1e-4)
            assert score["output_error"] < 1e-5
            continue
        assert score["selectivity"] == pytest.approx(float(budget), abs=0.01)
        assert 0 < score["recall_middle"] < 1
        assert score["output_error"] > 1e-4
        assert score["bytes_read"] > score["router_bytes"]
    order = [attention[m, "0.1"]["recall_middle"] for m in ("saap", "oracle", "random")]
    assert order == sorted(order, reverse=True)
    assert attention["saap", "0.1"]["recall_of_oracle"] > 0.9
    lost = [attention[m, "0.1"]["needles_lost"] for m in ("saap", "streaming", "random")]
    assert attention["dense", "0.1"]["needles_lost"] == 0
    assert lost[0] < 0.05 < min(lost[1:]), lost
    answers = [s for s in scores if s["task"] == "passkey"]
    assert {s["method"] for s in answers} == set(METHODS)
    assert all(0 <= s["accuracy"] <= 1 for s in answers)


def test_a_killed_run_continues_to_the_same_scores(
    finished, tmp_path, reference_model, reference_tokenizer, reference_index
):
    text = reference.split_held_out()[1]
    folder = tmp_path / "killed"
    folder.mkdir()
    whole = (finished / "records.jsonl").read_bytes()
    first_unit_end = whole.index(b'{"done"')
    for name, content in (
        ("run.json", (finished / "run.json").read_bytes()),
        ("records.jsonl", whole[: first_unit_end + 900]),  # in the middle of a later line
    ):
        (folder / name).write_bytes(content)
    with pytest.raises(
        ValueError, match="must be JSON; got a part of a line: the run was cut short"
    ):
        read_run(folder)
    run(reference_model, reference_tokenizer, reference_index, text, CONFIG, folder,
        model_name="reference")  # fmt: skip
    assert score_run(folder) == score_run(finished)


def test_a_run_that_was_not_finished_is_told(finished, tmp_path, monkeypatch, capsys):
    """Cut between two units its records look whole."""
    folder = tmp_path / "cut"
    folder.mkdir()
    run_file, records = (finished / name for name in ("run.json", "records.jsonl"))
    (folder / "run.json").write_bytes(run_file.read_bytes())
    lines = records.read_text().splitlines(keepends=True)
    first = next(n for n, line in enumerate(lines) if line.startswith('{"done"'))
    (folder / "records.jsonl").write_text("".join(lines[: first + 1]))
    told = f"1 of {CONFIG.n_texts} texts or prompts of attention at "
    assert check_folder(finished) == []
    found = check_folder(folder)
    assert [line for line in found if told in line] == found[:1]
    assert f"0 of {CONFIG.n_prompts} texts or prompts of passkey" in found[-1]
    assert told in make_report(folder).read_text()
    (line, *_) = compare(finished, folder).incomplete
    assert line.startswith(str(folder))
    assert told in line
    monkeypatch.setattr("sys.argv", ["saap", "report", str(folder), "--strict"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert "the run was not finished" in " ".join(capsys.readouterr().err.split())


def test_results_of_another_run_are_not_mixed(finished):
    with pytest.raises(
        ValueError, match="must hold results of this run, with seed 1; got results with seed 0"
    ):
        RecordFile(finished, {"config": {"seed": 1}})


def test_report_stands_alone_and_needs_no_model(finished, monkeypatch):
    monkeypatch.setattr("saap.hf.load_model", None)
    page = make_report(finished).read_text()
    assert page.count("data:image/png;base64,") == 5
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)
    assert "saap finds" in page
    for method in METHODS:
        assert f"<td>{method}</td>" in page


def test_folder_without_records(tmp_path):
    with pytest.raises(ValueError, match=r"got one without run\.json"):
        read_run(tmp_path)


def test_unwritable_folder(tmp_path, monkeypatch):
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        RecordFile(blocker / "out", {"config": {}})
    assert records_module.RUN == "run.json"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ()}, "methods must hold at least one value; got none"),
        ({"methods": ("saap", "kmean")}, "did you mean 'kmeans'"),
        ({"tasks": ("poetry",)}, "task must be one of attention, passkey.*; got 'poetry'"),
        ({"share": "layer"}, "share must be 'group' or 'head'; got 'layer'"),
        ({"window": 0}, "window must be an integer of at least 1; got 0"),
        ({"n_texts": 0}, "n_texts must be at least 1; got 0"),
        ({"tasks": ("speed", "speed")}, "tasks must hold each value once; got 'speed' twice"),
    ],
)
def test_bad_configs(options, message):
    with pytest.raises(ValueError, match=message):
        EvalConfig(**{"methods": ("dense",), "contexts": (1024,), **options})


def test_the_window_is_that_of_a_budget_or_what_is_asked_for():
    (variant,) = make_variants(("dense",), None, 0)
    budgets = [
        variant.points((0.5,), 8192, "group", *given)[0].budget
        for given in ((), (CONFIG.window,), (5,))
    ]
    assert [b.window for b in budgets] == [Budget.window, Budget.window, 5]
    assert {b.n_sink for b in budgets} == {Budget.n_sink}
    assert attention_rows(8192, 16)["window"] < attention_rows(8192, 200)["window"]


def test_contexts():
    assert check_contexts((4096,), 8192, 8192) == []
    (warning,) = check_contexts((8192,), 8192, 4096)
    assert "longer than the 4096 tokens" in warning
    with pytest.raises(ValueError, match=r"context must be at most the model's .*; got 9000"):
        check_contexts((9000,), 8192, None)


@pytest.mark.parametrize("depth", [0.0, 0.5, 0.95])
def test_pass_key_prompts(depth):
    import numpy as np

    text = reference.split_held_out()[1]
    prompt = passkey.make_prompt(text, 3000, np.random.default_rng(1), depth=depth)
    assert len(prompt.text) <= 3000
    assert prompt.context.count(b"# The pass key ") == 9
    asked = prompt.question.decode()
    assert prompt.context.decode().count(asked + prompt.answer) == 1
    where = prompt.context.decode().index(asked) / len(prompt.context)
    assert abs(where - depth) < 0.12
    assert passkey.is_right(prompt, prompt.answer.encode() + b"\n")
    assert not passkey.is_right(prompt, b"0" + prompt.answer.encode())


@pytest.mark.parametrize("bytes_a_token", [1, 3])
def test_pass_key_prompts_are_measured_in_tokens(bytes_a_token):
    import numpy as np

    text = reference.split_held_out()[1]

    def make(n_bytes):
        return passkey.make_prompts(text, n_bytes, np.random.default_rng(1), n_questions=3)

    def tokenizer(text, add_special_tokens):
        return {"input_ids": [0] * -(-len(text) // bytes_a_token)}

    prompts = prompts_of_tokens(make, tokenizer, 2000, len(text))
    for prompt in prompts:
        assert 0.97 * 2000 <= len(prompt.text) / bytes_a_token <= 2000


def test_pass_key_limits():
    import numpy as np

    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"n_distractors must be in .*; got 500"):
        passkey.make_prompt(b"x" * 4000, 3000, rng, n_distractors=500)
    with pytest.raises(ValueError, match="length=100 with 8 distractors"):
        passkey.make_prompt(b"x\n" * 4000, 100, rng)
