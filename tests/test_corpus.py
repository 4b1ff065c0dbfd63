"""Where training text comes from."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from saap.eval import corpora
from saap.eval.corpus import read_corpus, sequences


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
    with pytest.raises(
        ValueError, match=r"x\.jsonl, line 1: must hold text under 'text'; got id, body"
    ):
        read_corpus([file])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', "line 2: must be JSON"),
        ('["text"]', "line 2: must hold text under 'text'; got list"),
        ('{"text": 3}', "line 2: must hold text under 'text'; got text: --text-field"),
    ],
)
def test_bad_json_lines(tmp_path, line, message):
    file = written(tmp_path / "x.jsonl", '{"text": "good"}', line)
    with pytest.raises(ValueError, match=message):
        read_corpus([file])


@pytest.mark.parametrize("name", ["none.txt", "a/b/c", "/no/where", "bad name"])
def test_what_is_neither_a_path_nor_a_name(name):
    with pytest.raises(ValueError, match=r"must be a text file, .*; got no such file or folder"):
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
    with pytest.raises(ValueError, match="org/name, row 0: must hold text under 'body'; got text"):
        read_corpus([Path("org/name")], text_field="body")
    with pytest.raises(
        ValueError, match=r"broken: must be .*; got one that cannot be read \(the hub cannot"
    ):
        read_corpus([Path("broken")])


def test_a_dataset_of_the_library(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["one", "two"]})
    rows.save_to_disk(str(tmp_path / "saved"))
    assert read_corpus([tmp_path / "saved"]) == b"one\ntwo"


def test_a_folder_of_pages_in_any_encoding(tmp_path):
    (tmp_path / "b.html").write_bytes(b"<p>zwei</p><script>no()</script>")
    (tmp_path / "a.HTM").write_bytes(b"<meta charset=latin-1><p>caf\xe9</p>")
    (tmp_path / "c.html").write_bytes(b"<html><body><p class=x>zwei</body>")  # the text of b.html
    (tmp_path / "d.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "e.txt").write_bytes("sei \u00df".encode("utf-16"))
    (tmp_path / "style.css").write_text("p {}")
    text = read_corpus([tmp_path])
    assert text.decode().split("\n") == ["café", "zwei", "café au lait", "sei ß"]
    assert read_corpus([tmp_path, tmp_path / "d.txt"]) == text


def test_named_corpora(monkeypatch, tmp_path):
    code = corpora.read_named("code")
    assert any(b"def bisect_left" in text or b"class OrderedDict" in text for text in code)
    monkeypatch.setattr(corpora, "DOCUMENTATION", tmp_path)
    with pytest.raises(
        ValueError, match=r"corpus prose: .* PostgreSQL must be installed \(Debian"
    ):
        read_corpus([Path("prose")])
    for version, word in ((9, "old"), (15, "new")):
        folder = tmp_path / f"postgresql-doc-{version}" / "html"
        folder.mkdir(parents=True)
        (folder / "a.html").write_text(f"<p>{word}</p>")
        (folder / "b.js").write_text("index()")
    assert read_corpus([Path("prose")]) == b"new"


def test_a_corpus_shorter_than_a_text(reference_tokenizer):
    text = b"a few words "
    assert len(sequences(reference_tokenizer, text * 20, 100, 2)) == 2
    with pytest.raises(ValueError, match=r"at least the 1000 tokens of one text; got 24\d: bring"):
        sequences(reference_tokenizer, text * 20, 1000, 2)
