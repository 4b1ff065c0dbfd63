"""Records that somebody changed: `report` and `compare` say what is wrong in one line."""

import json

import pytest

from saap.eval.records import RECORDS, RUN, RecordFile
from saap.eval.scores import add_difference_to_dense

from .test_cli import bad, run_cli

COSTS = {"selectivity": 0.1, "bytes_read": 10, "router_bytes": 1}
HEADS = {"middle_mass": [0.5, 1], "middle_caught": [0.5, 1], "all_caught": [1, 1],
         "needle_mass": [0.4, 0], "needle_lost": [0.1, 0]}  # fmt: skip
ATTENTION = {"task": "attention", "context": 512, "method": "saap", "budget": "0.05", "layer": 0,
             "queries": 2, "output_error": 0.1, **COSTS, **HEADS}  # fmt: skip


def without(name, record=ATTENTION):
    return {key: value for key, value in record.items() if key != name}


@pytest.fixture
def folder(tmp_path):
    file = RecordFile(tmp_path, {"config": {"seed": 1}, "model": "m", "version": "1"})
    file.write("attention/512/0", [ATTENTION])
    return tmp_path


def test_a_folder_with_few_settings_is_reported(folder, monkeypatch, capsys):
    code, _, err = run_cli(monkeypatch, capsys, "report", folder)
    assert (code, err) == (0, "")


@pytest.mark.parametrize("command", ["report", "compare"])
@pytest.mark.parametrize(
    ("record", "message"),
    [
        bad(without("task"), "task of unit 'x' must be a text; got none"),
        bad(without("budget"), "budget of unit 'x' must be a text; got none"),
        bad({**ATTENTION, "context": "512"}, "context of unit 'x' must be an integer from 1"),
        bad({**ATTENTION, "output_error": 2**70}, "output_error of unit 'x' must be a number"),
        bad({**ATTENTION, "queries": 10**400}, "queries of unit 'x' must be an integer from 1"),
        bad({**ATTENTION, "context": 0}, "context of unit 'x' must be an integer from 1"),
        bad({**ATTENTION, "selectivity": None}, "selectivity of unit 'x' must be a number"),
        bad({**ATTENTION, "output_error": float("nan")}, "output_error of unit 'x' must be"),
        bad(
            {**ATTENTION, "middle_mass": 3},
            "middle_mass of unit 'x' must be a list of numbers from",
        ),
        bad({**ATTENTION, "middle_mass": [1.0]}, "must be 2 numbers, as in others; got 1"),
        bad({**ATTENTION, "needle_lost": [0.1]}, "must be 2 numbers, as in others; got 1"),
        bad({**ATTENTION, "needle_lost": [-0.1, 0]}, "must be a list of numbers from 0; got"),
        bad({**ATTENTION, "needle_lost": [0.5, 0]}, "must be at most the needles' 0.4; got 0.5"),
        bad(
            {**without("needle_lost"), "accuracy": 2}, "accuracy of unit 'x' must be a number from"
        ),
        bad({**ATTENTION, "queries": 0}, "queries of unit 'x' must be an integer from 1; got 0"),
        bad({"task": "attention", "context": 1}, "layer of unit 'x' must be an integer from 0"),
        bad(
            without("middle_mass"),
            "middle_mass of unit 'x' must be a list of numbers from 0; got none",
        ),
        bad({**ATTENTION, "budget": ""}, "budget of unit 'x' must be"),
    ],
)
def test_a_record_that_is_none(folder, monkeypatch, capsys, command, record, message):
    with open(folder / RECORDS, "a") as file:
        file.write(json.dumps({"unit": "x", **record}) + "\n")
    folders = [folder] if command == "report" else [folder, folder]
    code, _, err = run_cli(monkeypatch, capsys, command, *folders)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("name", [*COSTS, *HEADS, "queries", "output_error"])
def test_a_record_without_what_it_is_scored_by(folder, monkeypatch, capsys, name):
    with open(folder / RECORDS, "a") as file:
        file.write(json.dumps({"unit": "x", **without(name)}) + "\n")
    code, _, err = run_cli(monkeypatch, capsys, "report", folder)
    assert code == 2
    assert f"{name} of unit 'x' must be" in err
    assert err.strip().endswith("got none")


@pytest.mark.parametrize(
    "content", ["[1]", "3", "[" * 100_000, '{"config": {}, "environment": 1}']
)
def test_settings_that_are_none(folder, monkeypatch, capsys, content):
    (folder / RUN).write_text(content)
    code, _, err = run_cli(monkeypatch, capsys, "report", folder)
    assert code == 2
    assert "run.json: " in err
    assert len(err.splitlines()) == 1


def test_dense_of_other_units_is_compared_with_nothing():
    records = [
        {"unit": unit, "task": "perplexity", "context": 512, "method": method, "budget": budget,
         "nll": 2.0, "tokens": 8}
        for unit, method, budget in (("a", "dense", "1.0"), ("b", "saap", "0.05"))
    ]  # fmt: skip
    scores = [dict(task="perplexity", context=512, method="saap", budget="0.05")]
    add_difference_to_dense(scores, records)
    assert "to_dense" not in scores[0]


def test_settings_without_records_bind_no_other_run(tmp_path):
    """As a text that is too short leaves them."""
    RecordFile(tmp_path, {"model": "a", "config": {"seed": 0}})
    RecordFile(tmp_path, {"model": "b", "config": {"seed": 1}}).write("unit", [], None)
    assert json.loads((tmp_path / RUN).read_text())["model"] == "b"
    with pytest.raises(ValueError, match="choose another folder"):
        RecordFile(tmp_path, {"model": "a", "config": {"seed": 1}})


def test_a_file_of_the_same_name_is_not_written_over(tmp_path):
    (tmp_path / RUN).write_text('{"somebody": "else\'s"}')
    with pytest.raises(ValueError, match="must be a file that `saap eval` wrote"):
        RecordFile(tmp_path, {"model": "a", "config": {"seed": 0}})
    assert "somebody" in (tmp_path / RUN).read_text()


@pytest.mark.parametrize("command", ["report", "compare"])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("attention_rows", "x", "attention_rows must have numbers of rows, context, sinks"),
        ("attention_rows", {"512": {"context": "a"}}, "attention_rows must have numbers"),
        ("environment", {"packages": ["a"]}, "packages must be a mapping"),
    ],
)
def test_settings_of_another_form(folder, monkeypatch, capsys, command, name, value, message):
    path = folder / RUN
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    folders = [folder] if command == "report" else [folder, folder]
    code, _, err = run_cli(monkeypatch, capsys, command, *folders)
    assert code == 2
    assert message in err


def test_a_layer_with_fewer_records(folder, monkeypatch, capsys):
    file = RecordFile(folder, {"config": {"seed": 1}, "model": "m", "version": "1"})
    file.write("attention/512/1", [ATTENTION, {**ATTENTION, "layer": 1}])
    code, _, err = run_cli(monkeypatch, capsys, "report", folder)
    assert code == 2
    assert "must have as many records of every layer; got 2 of layer 0 and 1 of layer 1" in err


@pytest.mark.parametrize(
    "change",
    [
        {"budget": "inf"}, {"budget": "nan"}, {"budget": "1e400"},
        {"method": "$x_{$ a"}, {name: [0.0, 0.0] for name in HEADS},
    ],
)  # fmt: skip
def test_odd_records_are_reported(folder, monkeypatch, capsys, change):
    """At two budgets, so that lines are drawn."""
    file = RecordFile(folder, {"config": {"seed": 1}, "model": "m", "version": "1"})
    odd = {**ATTENTION, **change}
    file.write("attention/512/1", [ATTENTION, odd, {**odd, "budget": "0.1", "selectivity": 0.2}])
    code, _, err = run_cli(monkeypatch, capsys, "report", folder)
    assert (code, err) == (0, "")
