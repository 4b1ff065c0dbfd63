"""What the reference model is trained on: sources, held-out files, and sequences that ask."""

import hashlib
import re

import numpy as np
import pytest

from reference_training.recipe import CPU, GPU
from saap.eval import source_text as text
from saap.eval.reference import held_out_text, retrieval
from saap.eval.reference.retrieval import ITEMS, Draw
from saap.eval.reference.sequences import Mix, SequenceMaker
from saap.eval.reference.weaving import ANSWER_WEIGHT, line, weave
from saap.eval.tasks import needles, passkey, tracking

CORPUS = np.frombuffer(held_out_text()[:400_000], np.uint8)


@pytest.fixture(scope="module")
def makers():
    return SequenceMaker(CORPUS)


def answers_in(body: bytes, weights: np.ndarray) -> list[tuple[int, bytes]]:
    """Place and bytes of each run of answer weight."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], weights >= ANSWER_WEIGHT, [0]])))
    return [(int(a), body[a:b]) for a, b in edges.reshape(-1, 2)]


@pytest.mark.parametrize("length", [512, 2048, 9000])
@pytest.mark.parametrize("kind", [*ITEMS, "medley"])
def test_every_answer_stood_before(makers, kind, length):
    asked = 0
    for seed in range(6):
        body, weights = makers.make(kind, np.random.default_rng(seed), length)
        assert len(body) == len(weights) == length
        assert weights.dtype == np.float32
        for place, answer in answers_in(body, weights):
            assert answer in body[:place], (kind, seed, answer)
            asked += 1
    assert asked > 0 or kind == "long_copies"


def stated_before(body: bytes, place: int) -> bytes:
    return body[: body.rindex(b"\n", 0, place) + 1]


@pytest.mark.parametrize("seed", range(8))
def test_answers_are_right(makers, seed):
    """Read back from the text with patterns: names, chains and lines, by what stands there."""
    body, weights = makers.make("medley", np.random.default_rng(seed), 20_000)
    kinds = set()
    for place, answer in answers_in(body, weights):
        question = body[body.rindex(b"\n", 0, place) + 1 : place]
        before = stated_before(body, place)
        if match := re.fullmatch(rb"# The pass key ([a-z]+)", question):
            kinds.add("named")
            keys = re.findall(rb"^# The pass key %s(\d{7})$" % match[1], before, re.M)
            assert keys == [answer]
        elif match := re.match(rb"# All (\d) pass keys of ([a-z]+) above: ", question):
            kinds.add("values")
            keys = re.findall(rb"^# The pass key %s(\d{7})$" % match[2], before, re.M)
            assert len(keys) == int(match[1])
            given = question[match.end() :].split(b", ")[:-1]
            assert answer == keys[len(given)], "in the order of the text"
        elif match := re.match(rb"# Question: which .* value (\d{5}),.* variables are ", question):
            kinds.add("chains")
            given = question[match.end() :].split(b", ")[:-1]
            source = given[-1] if given else match[1]
            assert re.findall(rb"^VAR (\w{5}) = %s$" % source, before, re.M) == [answer]
        elif match := re.fullmatch(rb"# ([a-z]{16})", question):
            kinds.add("strings")
            assert re.findall(rb"^# %s([a-z]{24})$" % match[1], before, re.M) == [answer]
        else:
            kinds.add("next_lines")
            quoted = re.search(rb"# After the line: (.*)\n# follows: $", body[:place])[1]
            assert quoted + b"\n" + answer + b"\n" in before
    assert kinds >= {"named", "values", "chains", "strings", "next_lines"}


def test_long_copies_come_twice(makers):
    for seed in range(4):
        body, weights = makers.make("long_copies", np.random.default_rng(seed), 4096)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], weights == 1.5, [0]])))
        for start, stop in edges.reshape(-1, 2):
            assert body[start:stop] in body[:start]


def test_questions_are_those_of_the_tasks():
    rng = np.random.default_rng(0)
    chunk = SequenceMaker(CORPUS).chunk
    haystack = held_out_text()[:50_000]
    for task, maker, wanted in (
        (tracking.VariableTracking(), retrieval.chain, f"the {tracking.N_HOPS + 1} variables"),
        (needles.MultiValue(), retrieval.many_values, f"# All {needles.N_VALUES} pass keys"),
    ):
        (prompt,) = task.make(haystack, 4000, rng, 0.5)
        form = re.sub(rb"\d{5}|of [a-z]+", b"*", prompt.questions[0])
        while True:
            lines = maker(Draw(rng, 4000, chunk))
            if wanted.encode() in lines[-1].text:
                break
        ours = re.sub(rb"\d{5}(?!\d)|of [a-z]+", b"*", lines[-1].text)
        assert ours.startswith(form)
    stated = retrieval.named_key(Draw(rng, 4000, chunk))[0].text.decode()
    name, key = re.fullmatch(r".* ([a-z]+)(\d+)\n", stated).groups()
    assert stated == passkey.statement(name, key)


def test_short_sequences_leave_no_question_without_its_statement(makers):
    for seed in range(30):
        body, weights = makers.make("medley", np.random.default_rng(seed), 160)
        assert len(body) == 160
        for place, answer in answers_in(body, weights):
            assert answer in body[:place]


def test_weave_keeps_all_bytes_in_order():
    stated, asked = line(0.4, (0,), (b"first\n", 0.0)), line(0.4, (1,), (b"second\n", 8.0))
    body, weights = weave(b"a\nbb\nccc\n", [asked, stated])
    assert body == b"a\nbb\nfirst\nsecond\nccc\n"
    assert weights.tolist() == [1.0] * 5 + [0.0] * 6 + [20.0] + [8.0] * 6 + [1.0] * 4


def test_the_batches_of_the_shipped_model_are_as_they_were():
    """The demo draws its training texts so: other bytes would be another demo."""
    makers = SequenceMaker(np.frombuffer(held_out_text(), np.uint8))
    for mix, length, wanted in (
        (Mix(0.25, 0.35, 0.2, 0.2), 1024, "57a72bda2b3de810"),
        (Mix(text=0.5, keys=0.5), 8192, "1721a4bb0af712eb"),
    ):
        tokens, weights = makers.batch(np.random.default_rng([0, 5]), 8, length, mix)
        assert hashlib.sha1(tokens.tobytes() + weights.tobytes()).hexdigest()[:16] == wanted


def test_shares_sum_to_one():
    with pytest.raises(ValueError, match="sum to 1"):
        Mix(text=0.5, medley=0.6)
    assert [s.length for s in GPU.stages][-4:] == [2048, 8192, 32768, 131072]
    assert all(s.jump == 0 for s in GPU.stages), "positions are consecutive"
    assert CPU.sources == ("stdlib",)


@pytest.fixture
def tree(tmp_path):
    for number in range(200):
        folder = tmp_path / f"part{number % 7}"
        folder.mkdir(exist_ok=True)
        (folder / f"module{number}.py").write_text(f"# {number}\n" + "x = 1\n" * 50)
    return tmp_path


def test_held_out_files_are_disjoint_and_hashed_with_their_package(tree):
    for key in ("", "torch/"):
        held, trained = (
            set(text.read_sources(tree, held_out=side, key=key)) for side in (True, False)
        )
        assert held
        assert not held & trained
        assert len(held | trained) == 200
    plain, of_torch = (set(text.read_sources(tree, held_out=True, key=k)) for k in ("", "torch/"))
    assert plain != of_torch


def test_copies_of_held_out_files_are_left_out(tree):
    source = text.Source("made up", "1", "none", tree)
    held = next(iter(text.read_sources(tree, held_out=True)))
    name = next(n for n in (f"copy{i}.py" for i in range(100)) if not text.is_held_out(n))
    (tree / name).write_bytes(held)
    assert held in text.training_text([source], drop_copies=False)
    assert held not in text.training_text([source], drop_copies=True)


def test_missing_packages_are_told(monkeypatch):
    def absent(name):
        raise text.importlib.metadata.PackageNotFoundError(name)

    found, missing = text.find_sources(("stdlib", "numpy", "torch"))
    assert [s.name for s in found] == ["stdlib", "numpy", "torch"]
    assert not missing
    assert found[1].key == "numpy/"
    assert all(s.version and s.licence and s.root.is_dir() for s in found)
    monkeypatch.setattr(text.importlib.metadata, "distribution", absent)
    assert text.find_sources(("stdlib", "numpy"))[1] == ["numpy"]
    with pytest.raises(ValueError, match="source must be one of stdlib, numpy"):
        text.find_sources(("pandas",))
