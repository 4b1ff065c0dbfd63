"""A training in a work folder: killed at any point it goes on, to the same file."""

import copy
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from saap.training import TrainingOptions, prepare, train, train_file, work_folder_of
from saap.training.hidden import HiddenOnDisk

from .conftest import random_model
from .torch_threads import torch_threads

OPTIONS = TrainingOptions(nlist=8, steps=4, hidden=8, window=32)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads would spend their time waiting for each other over so little work."""
    with torch_threads(1):
        yield


@pytest.fixture(scope="module")
def model():
    return random_model("llama", num_hidden_layers=3)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(1, 96, (4, 120), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def training(model, tokens):
    return prepare(model, tokens, OPTIONS)


@pytest.fixture(scope="module")
def stages(model, training, tmp_path_factory):
    """Everything that an undisturbed training reports."""
    said = []
    train_file(
        model,
        training,
        tmp_path_factory.mktemp("whole") / "index",
        progress=lambda *now: said.append(now),
    )
    return said


@pytest.fixture(scope="module")
def whole(model, training, tmp_path_factory):
    """The bytes of an undisturbed training."""
    out = tmp_path_factory.mktemp("whole") / "index"
    train_file(model, training, out)
    assert [p.name for p in out.parent.iterdir()] == ["index"]
    return out.read_bytes()


class Killed(BaseException):
    pass


def killed_at(call: int):
    calls = 0

    def progress(*_):
        nonlocal calls
        if calls == call:
            raise Killed
        calls += 1

    return progress


def test_in_memory_and_in_a_folder_are_the_same(model, tokens, whole, tmp_path):
    index = train(model, tokens, nlist=8, steps=4, hidden=8, window=32)
    index.save(tmp_path / "index")
    assert (tmp_path / "index").read_bytes() == whole


def test_killed_again_and_again_it_goes_on(model, training, stages, whole, tmp_path):
    out = tmp_path / "index"
    finished_at_start = []
    for call in (0, 4, len(stages) // 2, 9, len(stages) // 3, 2):
        with pytest.raises(Killed):
            train_file(model, training, out, progress=killed_at(call))
        assert not out.exists()
        finished_at_start.append(len(list(work_folder_of(out).glob("layer-*"))))
    assert finished_at_start == sorted(finished_at_start)
    assert finished_at_start[-1] in (1, 2)
    said = []
    train_file(model, training, out, progress=lambda *now: said.append(now))
    assert said[0][0].startswith(f"layers ({finished_at_start[-1] + 1} of 3: ")
    assert said[0][1] == 1000 * finished_at_start[-1]
    assert out.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["index"]


def test_progress_grows_to_its_end(stages):
    done = [d for _, d, _ in stages]
    assert done == sorted(done)
    assert {total for *_, total in stages} == {3000}
    assert done[0] == 0
    assert done[-1] == 3000
    names = {what.split(": ")[1].split(",")[0].rstrip(")") for what, *_ in stages[:-1]}
    assert names == {"keys", "k-means", "masses", "routers"}


CHILD = """
import os, signal, sys, torch
sys.path.insert(0, sys.argv[1])
from tests.conftest import random_model
from tests.test_training_work import OPTIONS
from saap.index import tensor_files
from saap.training import prepare, train_file
model = random_model("llama", num_hidden_layers=3)
tokens = torch.randint(1, 96, (4, 120), generator=torch.Generator().manual_seed(1))
written = []
def write(path, content):
    if path.parent.name.startswith("hidden"):
        written.append(path)
    if len(written) == 6:  # the second sequence behind layer 1
        path.with_name("." + path.name).write_bytes(b"cut")
        os.kill(os.getpid(), signal.SIGKILL)
    atomically(path, content)
atomically, tensor_files.write_atomically = tensor_files.write_atomically, write
torch.set_num_threads(1)
train_file(model, prepare(model, tokens, OPTIONS), sys.argv[2])
"""


def test_sigkill_in_the_middle_of_a_write(model, training, whole, tmp_path):
    out = tmp_path / "new" / "index"
    root = Path(__file__).resolve().parents[1]
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(root), str(out)],
        capture_output=True, text=True, cwd=root,
    )  # fmt: skip
    assert child.returncode == -signal.SIGKILL, child.stderr
    left = {p.name for p in work_folder_of(out).iterdir()}
    assert left == {"manifest.json", "layer-0.safetensors", "hidden-0-1", "hidden-0-2.part"}
    train_file(model, training, out)
    assert out.read_bytes() == whole
    assert [p.name for p in out.parent.iterdir()] == ["index"]


def test_saved_but_not_tidied(model, training, whole, tmp_path, monkeypatch):
    """Killed between the index and the removal of the folder: nothing is trained again."""
    out = tmp_path / "index"
    with monkeypatch.context() as patch:
        patch.setattr("saap.training.whole_model.remove_work", lambda _: None)
        train_file(model, training, out)
    said = []
    train_file(model, training, out, progress=lambda *now: said.append(now))
    assert said == []
    assert out.read_bytes() == whole
    assert not work_folder_of(out).exists()


def test_another_training_in_the_folder(model, tokens, training, tmp_path):
    out = tmp_path / "index"
    with pytest.raises(Killed):
        train_file(model, training, out, progress=killed_at(8))
    others = (
        (prepare(model, tokens, TrainingOptions(nlist=4, steps=4, hidden=8, window=32)), model,
         "options.nlist=8; got 4: or delete"),
        (prepare(model, tokens[:, 1:], OPTIONS), model, "corpus.tokens=480; got 476"),
        (prepare(model, tokens + (tokens == 7), OPTIONS), model, "corpus.sha256="),
        (prepare(random_model("qwen3", num_hidden_layers=3), tokens, OPTIONS), model,
         "model.model_type='llama'; got 'qwen3'"),
        (training, tuned(model), "model.weights="),
    )  # fmt: skip
    for other, own_model, message in others:
        with pytest.raises(ValueError, match="unfinished training with ") as error:
            train_file(own_model, other, out)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    assert json.loads((work_folder_of(out) / "manifest.json").read_text())["options"]["nlist"] == 8


def tuned(model):
    """One whose attention is the same."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight += 1e-3
    return other


def test_other_cuts_of_the_same_tokens(model, tokens, tmp_path):
    out = tmp_path / "index"
    flat, cuts = tokens.flatten(), ([100, 140, 120, 120], [100, 120, 140, 120])
    first, other = (prepare(model, list(flat[:480].split(own)), OPTIONS) for own in cuts)
    with pytest.raises(Killed):
        train_file(model, first, out, progress=killed_at(8))
    with pytest.raises(ValueError, match=r"corpus\.cuts="):
        train_file(model, other, out)


def test_two_trainings_at_once(model, training, whole, tmp_path):
    """The second is refused, and the first goes on."""
    out, refused = tmp_path / "index", []

    def second(*_):
        if not refused:
            with pytest.raises(
                ValueError, match="must be used by one training at a time"
            ) as error:
                train_file(model, training, out)
            refused.append(error)

    train_file(model, training, out, progress=second)
    assert refused
    assert out.read_bytes() == whole
    assert not work_folder_of(out).exists()


def test_a_damaged_layer_is_told_before_others_are_trained(model, training, whole, tmp_path):
    out, said = tmp_path / "index", []
    layer = work_folder_of(out) / "layer-0.safetensors"

    def until_it_is_there(*_):
        if layer.is_file():
            raise Killed

    with pytest.raises(Killed):
        train_file(model, training, out, progress=until_it_is_there)
    layer.write_bytes(layer.read_bytes()[:-9])
    with pytest.raises(ValueError, match="delete that file to train the layer again"):
        train_file(model, training, out, progress=lambda *now: said.append(now))
    assert not said
    layer.unlink()
    train_file(model, training, out)
    assert out.read_bytes() == whole


def test_a_folder_of_something_else(model, training, tmp_path):
    out = tmp_path / "index"
    work_folder_of(out).mkdir()
    (work_folder_of(out) / "thesis.tex").write_text("all of it")
    with pytest.raises(ValueError, match="holds files but no manifest"):
        train_file(model, training, out)
    assert [p.name for p in work_folder_of(out).iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("successes", [0, 3, 5, 6, 11, 12])
def test_full_disk(model, training, whole, tmp_path, monkeypatch, successes):
    """After so many writes there is no room: one line, nothing cut short, and it goes on later."""
    out, calls = tmp_path / "index", 0

    def sync(_):
        nonlocal calls
        calls += 1
        if calls > successes:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("saap.index.atomic_files.os.fsync", sync)
        with pytest.raises(ValueError, match="No space left on device") as error:
            train_file(model, training, out)
    assert "\n" not in str(error.value)
    assert not out.exists()
    assert not list(tmp_path.rglob(".*"))
    train_file(model, training, out)
    assert out.read_bytes() == whole


def test_too_little_room_is_told_before_hours_of_work(model, training, tmp_path, monkeypatch):
    monkeypatch.setattr("saap.training.work.free_bytes", lambda _: 1000)
    with pytest.raises(ValueError, match=r"MB free for hidden states; got .* MB free"):
        train_file(model, training, tmp_path / "index")
    assert not list(tmp_path.iterdir())


def test_states_of_other_layers_are_not_taken(tmp_path):
    """A process that starts before what is stored begins at the embeddings."""
    for layer in (2, 3):
        (tmp_path / f"hidden-0-{layer}").mkdir()
    (tmp_path / "hidden-0-4.part").mkdir()
    (tmp_path / "hidden-1-5").mkdir()
    assert HiddenOnDisk(tmp_path, 0, 7).layer == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hidden-0-3", "hidden-1-5"]
    assert HiddenOnDisk(tmp_path, 0, 1).layer == 0
    assert [p.name for p in tmp_path.iterdir()] == ["hidden-1-5"]
