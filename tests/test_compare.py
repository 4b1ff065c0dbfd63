"""Two result folders: what changed beyond noise; and results that cannot be."""

import json

import numpy as np
import pytest

from saap.eval.bootstrap import LEAST_UNITS, ratio_difference
from saap.eval.checks import check_folder, suspicions
from saap.eval.compare import compare
from saap.eval.records import RecordFile
from saap.eval.scores import score_run

from .test_cli import run_cli

RUN = {"model": "tiny", "version": "1", "config": {"seed": 0}, "environment": {}, "index": None}


def attention_records(
    method, recall, rng, *, error=0.1, lost=0.1, selectivity=0.05, budget="0.05"
):
    mass = rng.uniform(5, 10, 4)
    noise = rng.normal(0, 0.01, 4)
    return {
        "task": "attention", "context": 1024, "method": method, "budget": budget, "layer": 0,
        "queries": 16, "middle_mass": mass.tolist(), "middle_caught": (mass * (recall + noise))
        .tolist(), "all_caught": [15.0] * 4, "output_error": error * 16,
        "needle_mass": (mass / 2).tolist(), "needle_lost": (mass / 2 * lost).tolist(),
        "selectivity": selectivity, "bytes_read": 1000.0, "router_bytes": 10,
    }  # fmt: skip


def write_folder(path, variants, n_texts=8, **run):
    """`variants`: name -> options of `attention_records`."""
    file = RecordFile(path, {**RUN, **run})
    for number in range(n_texts):
        rows = [
            attention_records(name, rng=np.random.default_rng(number), **options)
            for name, options in variants.items()
        ]
        file.write(f"attention/1024/{number}", rows, f"text{number}")
    return path


def verdicts(found):
    return {c.metric.name: c.verdict for c in found.changes}


def test_a_run_is_the_same_as_itself(tmp_path):
    a = write_folder(tmp_path / "a", {"saap": {"recall": 0.7}})
    found = compare(a, a)
    assert set(verdicts(found).values()) == {"same"}
    assert not found.worse
    assert not found.settings


def test_more_needles_lost_are_worse_though_recall_is_the_same(tmp_path):
    a = write_folder(tmp_path / "a", {"saap": {"recall": 0.7, "lost": 0.001}})
    b = write_folder(tmp_path / "b", {"saap": {"recall": 0.7, "lost": 0.002}})
    found = compare(a, b)
    assert verdicts(found)["needles_lost"] == "worse"
    assert verdicts(found)["recall_middle"] == "same"


def test_texts_without_needles_have_none_to_lose(tmp_path):
    folders = []
    for name in ("a", "b"):
        folders.append(tmp_path / name)
        file = RecordFile(folders[-1], RUN)
        for number in range(LEAST_UNITS):
            record = attention_records("saap", 0.7, np.random.default_rng(number))
            none = {"needle_mass": [0.0] * 4, "needle_lost": [0.0] * 4}
            file.write(f"attention/1024/{number}", [record | none], f"text{number}")
    assert "needles_lost" not in verdicts(compare(*folders))
    assert score_run(folders[0])[0]["needles_lost"] is None


@pytest.mark.parametrize(("recall", "verdict"), [(0.6, "worse"), (0.8, "better")])
def test_a_change_beyond_noise(tmp_path, recall, verdict):
    a = write_folder(tmp_path / "a", {"saap": {"recall": 0.7}})
    b = write_folder(tmp_path / "b", {"saap": {"recall": recall}}, version="2")
    found = compare(a, b)
    assert verdicts(found)["recall_middle"] == verdict
    assert verdicts(found)["output_error"] == "same"
    assert found.settings == ["version: 1 → 2"]
    assert found.changes[0].after == pytest.approx(recall, abs=0.01)


def test_two_texts_are_too_few(tmp_path):
    a = write_folder(tmp_path / "a", {"saap": {"recall": 0.7}}, n_texts=2)
    b = write_folder(tmp_path / "b", {"saap": {"recall": 0.6}}, n_texts=2)
    assert verdicts(compare(a, b))["recall_middle"] == "unclear"


def test_noise_is_seldom_called_a_change():
    """At the 95 % level about one pair of equal variants in twenty; 0.03 of 400 were measured."""
    rng = np.random.default_rng(0)
    ones = np.ones(8)
    called = [
        ratio_difference(
            np.stack([rng.normal(size=8), ones], 1), np.stack([rng.normal(size=8), ones], 1)
        ).excludes_zero
        for _ in range(400)
    ]
    assert np.mean(called) < 0.08


def test_intervals_hold_the_truth_and_need_units():
    rng = np.random.default_rng(1)
    a = np.stack([rng.normal(1.0, 0.1, 50), np.ones(50)], 1)
    b = a + np.stack([rng.normal(0.2, 0.05, 50), np.zeros(50)], 1)
    found = ratio_difference(a, b)
    assert found.low < 0.2 < found.high
    assert found.high - found.low < 0.05
    assert ratio_difference(a[: LEAST_UNITS - 1], b[: LEAST_UNITS - 1]).low is None


def test_what_only_one_run_holds_is_told(tmp_path):
    a = write_folder(tmp_path / "a", {"saap": {"recall": 0.7}, "quest": {"recall": 0.5}})
    b = write_folder(tmp_path / "b", {"saap": {"recall": 0.7}, "lsh": {"recall": 0.4}})
    found = compare(a, b)
    assert [p[2] for p in found.only_a] == ["quest"]
    assert [p[2] for p in found.only_b] == ["lsh"]


def folders(tmp_path):
    return {
        "A": write_folder(tmp_path / "a", {"saap": {"recall": 0.7}}),
        "WORSE": write_folder(tmp_path / "worse", {"saap": {"recall": 0.6}}),
        "SEED": write_folder(tmp_path / "s", {"saap": {"recall": 0.7}}, config={"seed": 1}),
        "OTHER": write_folder(tmp_path / "o", {"lsh": {"recall": 0.7}}),
        "NONE": tmp_path / "none",
        "TEXT": other_text(tmp_path / "t"),
    }


def other_text(path):
    write_folder(path, {"saap": {"recall": 0.7}})
    records = path / "records.jsonl"
    records.write_text(records.read_text().replace("text3", "another"))
    return path


@pytest.mark.parametrize(
    ("a", "b", "code", "message"),
    [
        ("A", "A", 0, "without change beyond noise"),
        ("A", "WORSE", 1, "worse"),
        ("WORSE", "A", 0, "better"),
        ("A", "NONE", 2, "got one without run.json"),
        ("A", "SEED", 2, "must judge the same texts and prompts; got seed 0 in the first and 1"),
        ("A", "TEXT", 2, "got another text for attention/1024/3 in the second"),
        ("A", "OTHER", 2, "must share at least one result"),
    ],
)
def test_exit_codes(monkeypatch, capsys, tmp_path, a, b, code, message):
    places = folders(tmp_path)
    found, out, err = run_cli(monkeypatch, capsys, "compare", places[a], places[b])
    assert found == code
    assert message in " ".join((out + err).split())


def test_the_table_names_variants(monkeypatch, capsys, tmp_path):
    a = write_folder(tmp_path / "a", {"quest[page_size=8]": {"recall": 0.7}})
    b = write_folder(tmp_path / "b", {"quest[page_size=8]": {"recall": 0.6}})
    _, out, _ = run_cli(monkeypatch, capsys, "compare", a, b)
    (row,) = (line for line in out.splitlines() if line.startswith("worse"))
    assert "recall" in row
    assert "quest[page_size=8]" in out.replace("\n", "")


def test_level_is_checked(tmp_path):
    a = write_folder(tmp_path / "a", {"saap": {"recall": 0.7}})
    with pytest.raises(ValueError, match=r"level must be at least 0\.5 and below 1; got 1\.5"):
        compare(a, a, level=1.5)


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ({"oracle": {"recall": 0.7}, "blend": {"recall": 0.75}}, "more of the middle than oracle"),
        ({"oracle-tokens": {"recall": 0.7}, "quest": {"recall": 0.8}}, "than oracle-tokens"),
        ({"quest": {"recall": 0.9, "error": 0.0}}, "same output as dense"),
        ({"quest": {"recall": 0.5, "selectivity": 0.3}}, "visits 30.0% of the cache at a budget"),
        ({"dense": {"recall": 1.0, "error": 0.1, "selectivity": 1.0}}, "differs from itself"),
    ],
)
def test_results_that_cannot_be(tmp_path, variants, message):
    (line,) = check_folder(write_folder(tmp_path / "a", variants))
    assert message in line


@pytest.mark.parametrize(
    "variants",
    [
        # quest has lists of its own: the oracle over the trained partition is not its ceiling.
        {"oracle": {"recall": 0.7}, "quest": {"recall": 0.8}},
        {"oracle": {"recall": 0.7}, "blend": {"recall": 0.705}},
        {"oracle": {"recall": 0.7, "error": 0.01}, "dense": {"recall": 1, "error": 0,
                                                             "selectivity": 1.0}},
    ],
)  # fmt: skip
def test_results_that_can_be(tmp_path, variants):
    assert check_folder(write_folder(tmp_path / "a", variants)) == []


def test_equal_predictions_below_full_budget():
    common = {"task": "perplexity", "context": 1024, "budget": "0.05", "tokens": 64}
    rows = [
        {**common, "unit": f"p/{i}", "method": m, "nll": 90.0 + i, "selectivity": s}
        for i in range(3)
        for m, s in (("dense", 1.0), ("saap", 0.05))
    ]
    (line,) = suspicions(rows)
    assert "saap predicts exactly what dense attention does" in line


@pytest.mark.parametrize(("context", "suspicious"), [(512, False), (4096, True)])
def test_a_short_context_may_be_visited_whole(tmp_path, context, suspicious):
    rng = np.random.default_rng
    rows = [
        {**attention_records(name, recall, rng(i), selectivity=share), "unit": f"a/{i}",
         "context": context}
        for i in range(LEAST_UNITS)
        for name, recall, share in (("saap", 1.0, 1.0), ("oracle-tokens", 0.6, 0.05))
    ]  # fmt: skip
    assert bool(suspicions(rows)) == suspicious


def test_strict_report_fails(monkeypatch, capsys, tmp_path):
    variants = {"oracle": {"recall": 0.7}, "blend": {"recall": 0.9}}
    folder = write_folder(
        tmp_path / "a", variants, config={"contexts": [1024]},
        environment={"device": "x", "cores": 1, "threads": 1, "python": "3", "packages": {}},
    )  # fmt: skip
    code, _, err = run_cli(monkeypatch, capsys, "report", folder, "--strict")
    assert code == 1
    assert "suspicious: blend finds" in err
    assert "suspicious" in (folder / "report.html").read_text()
    assert run_cli(monkeypatch, capsys, "report", folder)[0] == 0


def test_a_damaged_line_is_told(tmp_path):
    folder = write_folder(tmp_path / "a", {"saap": {"recall": 0.7}})
    path = folder / "records.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[1][:20] + "\n", *lines[2:]]))
    with pytest.raises(
        ValueError, match=r"line 2 of 16 must be JSON; got another text: the file was damaged"
    ):
        RecordFile(folder, RUN)
    assert len(path.read_text().splitlines()) == 16


def test_results_of_two_versions_are_not_mixed(tmp_path):
    folder = write_folder(tmp_path / "a", {"saap": {"recall": 0.7}})
    before = (folder / "records.jsonl").read_bytes()
    with pytest.raises(
        ValueError, match=r"must hold results of version 2, .*; got results of version 1"
    ):
        RecordFile(folder, {**RUN, "version": "2"})
    assert (folder / "records.jsonl").read_bytes() == before
    assert json.loads((folder / "run.json").read_text())["version"] == "1"
