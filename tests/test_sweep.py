"""Sweeps: build and search parameters apart, one build for many points; what no one reads."""

import pytest

from saap.eval.arms import make_arms
from saap.eval.run import EvalConfig
from saap.eval.sweep import read_sweep, with_parameters
from saap.eval.tasks.answering import decoders
from saap.methods import METHODS

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
    arms = make_arms(config.methods, None, 0)
    assert [a.label for a in arms] == [
        "dense", "quest", "kmeans-online[rows_per_cluster=8,n_iter=2]",
        "kmeans-online[rows_per_cluster=16,n_iter=2]",
    ]  # fmt: skip
    labels = [[p.label for p in a.points((0.2,), 1000, "group")] for a in arms]
    clusters = ["nprobe=4", "nprobe=8"]
    assert labels == [["0.2"], ["0.2 share=group", "0.2 share=head"], clusters, clusters]
    assert arms[2].method.build_options.rows_per_cluster == 8
    assert arms[2].points((0.2,), 1000, "group")[1].budget.nprobe == 8


def test_one_build_serves_many_points(captured, monkeypatch):
    (arm,) = make_arms(({"name": "hnsw", "search": {"ef": [16, 32, 64]}},), None, 0)
    builds = []
    build = METHODS["hnsw"].build
    monkeypatch.setattr(
        METHODS["hnsw"], "build", lambda self, keys: builds.append(keys.layer) or build(self, keys)
    )
    points = arm.points((0.2, 0.3), 1024, "group")
    seen = []
    for point, decode in decoders(captured, arm, points, 4):
        decode(captured.calls[0].__class__(**{
            **captured.calls[0].__dict__,
            **{n: getattr(captured.calls[0], n)[:, :, -1:]
               for n in ("q_rope", "q_derope", "k_rope", "k_derope", "v")},
        }))  # fmt: skip
        seen.append((decode.layers[0].selector.search.ef, decode.layers[0].store.length))
        assert decode.layers[0].budget == point.budget
    assert builds == [0]
    assert seen == [(ef, 1025) for ef in (16, 16, 32, 32, 64, 64)]


def test_parameters_of_the_command_line():
    found = with_parameters(("dense", "quest"), ["quest.page_size=8,32"], ["quest.share=head"])
    assert found == (
        "dense", {"name": "quest", "build": {"page_size": [8, 32]}, "search": {"share": ["head"]}},
    )  # fmt: skip
    assert [a.method.page_size for a in make_arms(found[1:], None, 0)] == [8, 32]


def bad(text, message):
    return pytest.param(text, message, id=message[:30])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        bad("", "the sweep is empty"),
        bad("- dense", "holds list: accepted is a mapping"),
        bad("methods: [dense]\nbudget: 0.1", "no one reads 'budget' (did you mean 'budgets'?)"),
        bad("methods: []", "methods is empty"),
        bad("methods: [dens]", "did you mean 'dense'"),
        bad("methods: [{search: {ef: 3}}]", "has no name"),
        bad("methods: [{name: hnsw, search: {eff: 3}}]", "search of hnsw: no one reads 'eff' "
            "(did you mean 'ef'?)"),
        bad("methods: [{name: hnsw, build: {ef: 3}}]", "build of hnsw: no one reads 'ef'"),
        bad("methods: [{name: hnsw, search: {ef: []}}]", "ef is empty"),
        bad("methods: [dense]\ncontexts: [8k]", "contexts: '8k': accepted is int"),
        bad("methods: [dense]\nbudgets: [x]", "budgets: 'x': accepted is int or float"),
        bad("methods: [dense]\ntasks: [pass-key]", "did you mean 'passkey'"),
        bad("methods: [dense", "is not YAML"),
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


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("quest.page_size", "accepted is METHOD.KEY=VALUE"),
        ("saap.page_size=3", "'saap' is not among those of --methods"),
        ("quest.pages=3", "build of quest: no one reads 'pages'"),
    ],
)
def test_bad_parameters(monkeypatch, capsys, tmp_path, option, message):
    code, _, err = run_cli(
        monkeypatch, capsys, "eval", "reference", "--methods", "quest", "--build", option,
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 2
    assert message in err
