"""Several processes train one model: the same file as one; when one fails, the others stop."""

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from torch.distributed import HashStore

from saap.training import Processes, ProcessLost, train, train_file, work_folder_of

from .conftest import random_model
from .test_training_work import model, one_thread, tokens, training, whole  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]


def pair(patience: float = 30.0) -> list[Processes]:
    store = HashStore()
    return [Processes(store, rank, 2, patience=patience) for rank in range(2)]


def together(*works):
    """Run each in a thread of its own; what they returned or raised."""
    found = [None] * len(works)

    def run(number):
        try:
            found[number] = works[number]()
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_two_give_the_file_of_one(training, whole, tmp_path):  # noqa: F811
    out = tmp_path / "index"
    models = [random_model("llama", num_hidden_layers=3) for _ in range(2)]
    trained = {}

    def work(processes):
        said = trained[processes.rank] = []
        with processes:
            train_file(
                models[processes.rank],
                training,
                out,
                progress=lambda *now: said.append(now),
                processes=processes,
            )

    works = [lambda p=p: work(p) for p in pair()]
    assert together(*works) == [None, None]
    assert out.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["index"]
    layers = {
        rank: {what[8] for what, *_ in said if "routers" in what} for rank, said in trained.items()
    }
    assert layers == {0: {"1", "3"}, 1: {"2"}}


def test_an_error_of_one_stops_the_others(model, training, tmp_path):  # noqa: F811
    first, second = pair()

    def fails():
        with second:
            raise FloatingPointError("layer 1: router loss is nan at step 0")

    def waits():
        with first:
            train_file(model, training, tmp_path / "index", processes=first)

    lost, failed = together(waits, fails)
    assert isinstance(failed, FloatingPointError)
    assert isinstance(lost, ProcessLost)
    assert str(lost) == "process 1 stopped: layer 1: router loss is nan at step 0"


def test_one_that_is_silent_counts_as_dead(monkeypatch):
    first, second = pair(patience=0.5)
    monkeypatch.setattr(second, "_leave", lambda: None)  # as if it were killed

    def waits():
        with first:
            first.reach("somewhere")

    def falls_silent():
        with second:
            pass

    lost, _ = together(waits, falls_silent)
    assert isinstance(lost, ProcessLost)
    assert "process 1 has not been heard of for" in str(lost)


def test_a_folder_that_is_not_shared(model, training, tmp_path):  # noqa: F811
    def work(processes):
        with processes:
            train_file(model, training, tmp_path / str(processes.rank) / "x", processes=processes)

    found = together(*(lambda p=p: work(p) for p in pair()))
    assert "must be a folder that all processes share" in str(found[1])
    assert isinstance(found[0], ProcessLost)


def test_processes_without_a_folder(model, tokens):  # noqa: F811
    with pytest.raises(ValueError, match="must share a work folder; got none: pass `work`"):
        train(model, tokens, nlist=8, processes=pair()[0])


CHILD = """
import os, signal, sys, torch
sys.path.insert(0, sys.argv[1])
from tests.conftest import random_model
from tests.test_training_work import OPTIONS
from saap.training import Processes, prepare, train_file
torch.set_num_threads(1)
model = random_model("llama", num_hidden_layers=3)
tokens = torch.randint(1, 96, (4, 120), generator=torch.Generator().manual_seed(1))
def progress(what, *_):
    if processes.rank == 1 and "routers" in what:
        os.kill(os.getpid(), signal.SIGKILL)
with Processes.from_environment(patience=4.0) as processes:
    train_file(model, prepare(model, tokens, OPTIONS), sys.argv[2], progress=progress,
               processes=processes)
"""


def test_a_killed_process_does_not_leave_the_other_hanging(
    model,  # noqa: F811
    training,  # noqa: F811
    whole,  # noqa: F811
    tmp_path,
):
    """Real processes and a real store; what was finished is gone on from, alone."""
    out = tmp_path / "index"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}  # fmt: skip
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(ROOT), str(out)], cwd=ROOT, text=True,
            env={**common, "RANK": str(rank)}, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    errors = [child.communicate(timeout=300)[1] for child in children]
    assert children[1].returncode == -signal.SIGKILL, errors[1]
    assert children[0].returncode == 1
    assert "ProcessLost: process 1 has not been heard of for 4 s; finished layers are" in errors[0]
    assert not out.exists()
    assert (work_folder_of(out) / "layer-0.safetensors").is_file()
    train_file(model, training, out)
    assert out.read_bytes() == whole


def test_outside_of_torchrun_there_are_no_processes(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert Processes.from_environment() is None
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert Processes.from_environment() is None
