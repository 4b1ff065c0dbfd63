"""The notebook of `examples/` runs from its first cell to its last, and shows what it says."""

import ast
import json
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

import saap
from saap.eval.scores import Scores
from saap.notebook import line, rows_table, size

PATH = Path(__file__).resolve().parents[1] / "examples" / "quickstart.ipynb"


def run_cell(source: str, names: dict):
    """What a notebook shows below a cell: the value of its last expression, if it is one."""
    parts = ast.parse(source).body
    last = parts.pop() if isinstance(parts[-1], ast.Expr) else None
    exec(compile(ast.Module(parts, []), str(PATH), "exec"), names)
    return (
        None
        if last is None
        else eval(compile(ast.Expression(last.value), str(PATH), "eval"), names)
    )


def test_the_notebook_runs(monkeypatch, capsys):
    matplotlib.use("Agg")
    monkeypatch.setattr(plt, "show", lambda: None)
    notebook = json.loads(PATH.read_text())
    names, shown = {}, []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
            shown.append(run_cell("".join(cell["source"]), names))
    told = capsys.readouterr().out
    assert told.count("4821736") == 3  # the hidden line, and both answers
    assert "tokens" in shown[1]._repr_html_()
    assert "oracle-tokens" in shown[2]._repr_html_()
    scores = names["scores"]
    found = {s["method"]: s["recall_middle"] for s in scores if s["budget"] == "0.15"}
    assert found["oracle-tokens"] >= found["saap"] > max(found["quest"], found["streaming"])
    plt.close("all")


def test_what_is_shown_is_escaped():
    table = rows_table("<b>", ("method", "x"), [["<script>", "1 & 2"]])
    assert "<script>" not in table
    assert "&lt;script&gt;" in table
    assert "1 &amp; 2" in table
    assert "&lt;b&gt;" in table


def test_an_index_and_a_store_are_told_in_a_line(reference_index):
    told = repr(reference_index)
    assert "\n" not in told
    assert len(told) < 300
    assert f"buckets: {reference_index.nlist}" in told
    assert "<table>" in reference_index._repr_html_()
    store = saap.KVStore(None, saap.Budget(max_tokens=64))
    assert "tokens: 0" in repr(store)
    keys = torch.randn(1, 2, 40, 16)
    store.append(keys, keys, keys)
    assert "tokens: 40" in repr(store)
    assert "<td" in store._repr_html_()


def test_scores_without_a_figure_have_a_dash():
    both = Scores(
        [
            {
                "method": "saap",
                "task": "passkey",
                "context": 8192,
                "budget": "0.05",
                "accuracy": 1.0,
            },
            {"method": "saap", "task": "attention", "context": 8192, "budget": "0.05"},
        ]
    )
    assert "100%" in both._repr_html_()
    assert "–" in both._repr_html_()


@pytest.mark.parametrize(
    ("nbytes", "told"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1500, "1.5 kB"),
        (2.5e6, "2.5 MB"),
        (3e12, "3,000.0 GB"),
    ],
)
def test_sizes(nbytes, told):
    assert size(nbytes) == told
    assert line("Name", [("size", told)]) == f"Name(size: {told})"
