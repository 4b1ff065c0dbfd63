"""Sweeps: build and search parameters apart, one build for many points; what nothing uses."""

from pathlib import Path

import pytest

from saap import hf
from saap.budget import Budget
from saap.eval.decoding import decoders
from saap.eval.run import EvalConfig
from saap.eval.sweep import read_sweep, with_parameters
from saap.eval.variants import Point, check_method_entry, make_variants
from saap.methods import METHODS
from saap.selector import LayerInfo

from .test_cli import run_cli

SWEEP = """
contexts: [1024, 2048]
budgets: 0.1
tasks: [attention]
methods:
  - dense
  - name: quest
    search: {share: [group, head]}
  - name: kmeans-online
    build: {rows_per_cluster: [8, 16], n_iter: 2}
    search: {nprobe: [4, 8]}
"""


def write(tmp_path, text):
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    return path


def test_a_sweep_is_all_combinations(tmp_path):
    config = EvalConfig(**read_sweep(write(tmp_path, SWEEP)))
    assert config.contexts == (1024, 2048)
    assert config.budgets == (0.1,)
    variants = make_variants(config.methods, None, 0)
    assert [a.label for a in variants] == [
        "dense", "quest", "kmeans-online[rows_per_cluster=8,n_iter=2]",
        "kmeans-online[rows_per_cluster=16,n_iter=2]",
    ]  # fmt: skip
    labels = [[p.label for p in a.points((0.2,), 1000, "group")] for a in variants]
    clusters = ["nprobe=4", "nprobe=8"]
    assert labels == [["0.2"], ["0.2 share=group", "0.2 share=head"], clusters, clusters]
    assert variants[2].method.build_options.rows_per_cluster == 8
    assert variants[2].points((0.2,), 1000, "group")[1].budget.nprobe == 8


def test_one_build_serves_many_points(tiny_model, tiny_tokens, monkeypatch):
    (variant,) = make_variants(({"name": "hnsw", "search": {"ef": [16, 32, 64]}},), None, 0)
    builds = []
    build = METHODS["hnsw"].build
    monkeypatch.setattr(
        METHODS["hnsw"], "build", lambda self, keys: builds.append(keys.layer) or build(self, keys)
    )
    tokens = tiny_tokens[0]
    read = hf.read_context(tiny_model, tokens)
    budgets = [Budget(max_tokens=n, n_sink=4, window=32) for n in (20, 60)]
    points = [Point("", budget, search) for search in variant.search for budget in budgets]
    seen = []
    for point, decoder in decoders(tiny_model, read, variant, points, 4):
        decoder.logits([5, 6])
        store = decoder.cache.saap_layers[0].store
        seen.append((store.selector.method.search_options.ef, store.length))
        assert store.budget == point.budget
    assert [layer.number for layer in builds] == [0, 1]
    assert seen == [(ef, 302) for ef in (16, 16, 32, 32, 64, 64)]


def test_parameters_of_the_command_line():
    found = with_parameters(("dense", "quest"), ["quest.page_size=8,32"], ["quest.share=head"])
    assert found == (
        "dense", {"name": "quest", "build": {"page_size": [8, 32]}, "search": {"share": ["head"]}},
    )  # fmt: skip
    assert [a.method.page_size for a in make_variants(found[1:], None, 0)] == [8, 32]


def bad(text, message):
    return pytest.param(text, message, id=message[:30])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        bad("", "a sweep must hold at least 'methods'"),
        bad("- dense", "must be a mapping of keys; got list"),
        bad("methods: [dense]\nbudget: 0.1", "got 'budget' (did you mean 'budgets'?)"),
        bad("methods: []", "methods must hold at least one value; got none"),
        bad("methods: [dens]", "did you mean 'dense'"),
        bad("methods: [{search: {ef: 3}}]", "a method must be a mapping with 'name'"),
        bad("methods: [{name: hnsw, search: {eff: 3}}]", "got 'eff' (did you mean 'ef'?)"),
        bad("methods: [{name: hnsw, build: {ef: 3}}]", "build of hnsw: a key must be one of"),
        bad("methods: [{name: hnsw, search: {ef: []}}]", "ef must be a value or a list"),
        bad("methods: [dense]\ncontexts: [8k]", "contexts must be int; got '8k'"),
        bad("methods: [dense]\nbudgets: [x]", "budgets must be int or float; got 'x'"),
        bad("methods: [dense]\ntasks: [pass-key]", "did you mean 'passkey'"),
        bad("methods: [dense", "must be YAML"),
    ],
)  # fmt: skip
def test_bad_sweeps(monkeypatch, capsys, tmp_path, text, message):
    out = tmp_path / "out"
    code, _, err = run_cli(
        monkeypatch, capsys, "eval", "reference", "--sweep", write(tmp_path, text), "--out", out
    )
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not out.exists()


def test_no_number_is_one_where_it_means_something():
    (entry,) = with_parameters(("saap",), [], ["saap.width=none,2.5"])
    check_method_entry(entry)
    (variant,) = make_variants((entry,), None, 0)
    assert [own["width"] for own in variant.search] == [None, 2.5]
    with pytest.raises(ValueError, match="search of saap: width must be a number or none; got"):
        check_method_entry({"name": "saap", "search": {"width": ["wide"]}})


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("quest.page_size", "must be METHOD.KEY=VALUE"),
        ("saap.page_size=3", "must name a method of --methods, quest; got 'saap.page_size=3'"),
        ("quest.pages=3", "build of quest: a key must be one of"),
        ("quest.page_size=big", "build of quest: page_size must be a whole number; got 'big'"),
        ("quest.page_size=16,2.5", "build of quest: page_size must be a whole number; got 2.5"),
        ("quest.page_size=none", "build of quest: page_size must be a whole number; got None"),
    ],
)
def test_bad_parameters(monkeypatch, capsys, tmp_path, option, message):
    code, _, err = run_cli(
        monkeypatch, capsys, "eval", "reference", "--methods", "quest", "--build", option,
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 2
    assert message in err


def test_importance_of_layers_is_one_value(tmp_path):
    text = """
contexts: 1024
methods:
  - {name: saap, search: {min_weight: [0.001, 0.01], max_tokens: 60,
     layer_importance: [[1.5, 0.5, 1, 1]]}}
"""
    (variant,) = make_variants(EvalConfig(**read_sweep(write(tmp_path, text))).methods, None, 0)
    points = variant.points((0.2,), 1000, "group")
    assert [p.budget.min_weight for p in points] == [0.001, 0.01]
    assert all(p.budget.layer_importance == (1.5, 0.5, 1.0, 1.0) for p in points)
    assert points[0].label == "min_weight=0.001 max_tokens=60 layer_importance=(4 numbers)"


def test_the_sweep_of_the_page_can_be_run(tmp_path):
    """Its methods follow the bounds that it names."""
    page = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text()
    text = page.split("```yaml\n")[1].split("```")[0]
    config = EvalConfig(**read_sweep(write(tmp_path, text)))
    for variant in make_variants(config.methods, None, 0):
        for point in variant.points(config.budgets, 2048, "group"):
            selector = variant.method.selector(LayerInfo(0.125))
            if selector is not None:
                selector.check_budget(point.budget)
