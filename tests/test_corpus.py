"""Where training text comes from."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from saap.eval.corpus import read_corpus


def written(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines))
    return path


def test_files_folders_and_json_lines(tmp_path):
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    written(tmp_path / "folder" / "b.txt", "two")
    written(tmp_path / "folder" / "a.md", "one")
    written(tmp_path / "folder" / "deep" / "c.jsonl", '{"text": "three"}', "", '{"text": "four"}')
    written(tmp_path / "folder" / "picture.png", "no text")
    single = written(tmp_path / "single", "zero")
    text = read_corpus([single, tmp_path / "folder"])
    assert text.decode().split("\n") == ["zero", "one", "two", "three", "four"]


def test_a_field_of_json_lines(tmp_path):
    file = written(tmp_path / "x.jsonl", *(json.dumps({"id": i, "body": f"t{i}"}) for i in (1, 2)))
    assert read_corpus([file], text_field="body") == b"t1\nt2"
    with pytest.raises(ValueError, match=r"x\.jsonl, line 1: no text under 'text', but id, body"):
        read_corpus([file])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', "line 2: not JSON"),
        ('["text"]', "line 2: no text under 'text', but list"),
        ('{"text": 3}', "line 2: no text under 'text', but text; --text-field"),
    ],
)
def test_bad_json_lines(tmp_path, line, message):
    file = written(tmp_path / "x.jsonl", '{"text": "good"}', line)
    with pytest.raises(ValueError, match=message):
        read_corpus([file])


@pytest.mark.parametrize("name", ["none.txt", "a/b/c", "/no/where", "bad name"])
def test_what_is_neither_a_path_nor_a_name(name):
    with pytest.raises(ValueError, match="no such file or folder; accepted are text files"):
        read_corpus([Path(name)])


def test_a_dataset_without_the_library(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"org/name:config: no such .* pip install datasets$"):
        read_corpus([Path("org/name:config")])
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(ImportError, match="a saved Hugging Face dataset; to read it: pip install"):
        read_corpus([tmp_path])


def stand_in(rows, asked):
    """What is called of the library `datasets`, over `rows`."""

    def load_dataset(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        if name == "broken":
            raise ConnectionError("the hub cannot be reached\nand more")
        return iter(rows)

    def load_from_disk(path):
        asked.append(path)
        return {"validation": [{"text": "no"}], "train": rows}

    return SimpleNamespace(load_dataset=load_dataset, load_from_disk=load_from_disk)


def test_names_of_datasets(monkeypatch, tmp_path):
    asked: list = []
    rows = [{"text": "one"}, {"text": "two"}, {"text": "three"}]
    monkeypatch.setitem(sys.modules, "datasets", stand_in(rows, asked))
    assert read_corpus([Path("org/name")], enough=4) == b"one\ntwo"
    assert read_corpus([Path("name:config:test")]) == b"one\ntwo\nthree"
    (tmp_path / "dataset_dict.json").write_text("{}")
    assert read_corpus([tmp_path], enough=1) == b"one"
    assert asked == [
        ("org/name", None, "train", True), ("name", "config", "test", True), str(tmp_path),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="org/name, row 0: no text under 'body', but text"):
        read_corpus([Path("org/name")], text_field="body")
    with pytest.raises(ValueError, match=r"broken: cannot be read as a dataset \(the hub cannot"):
        read_corpus([Path("broken")])


def test_a_dataset_of_the_library(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["one", "two"]})
    rows.save_to_disk(str(tmp_path / "saved"))
    assert read_corpus([tmp_path / "saved"]) == b"one\ntwo"
