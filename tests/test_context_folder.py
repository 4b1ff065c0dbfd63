"""Caches whose keys and values lie in files: the same tokens, and what is left after accidents."""

import contextlib
import copy
import errno
import os
import resource
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

import saap
from saap import Budget, context_folder
from saap.hf import over
from saap.kv import row_file
from tests.conftest import SMALL, random_model
from tests.test_generate import FAMILIES

pytestmark = pytest.mark.many_steps

BUDGET = Budget(max_tokens=64, n_sink=4, window=16, flush_every=8)
LAYERS, ROW = SMALL["num_hidden_layers"], 2 * 2 * 16 * 4  # bytes of a token in one layer
FAST = 240 * LAYERS * ROW  # of 700 and more tokens


@pytest.fixture(scope="module")
def long_tokens():
    return torch.randint(1, 96, (1, 800), generator=torch.Generator().manual_seed(7))


def step(model, cache, tokens):
    with torch.no_grad():
        return model(tokens, **over(cache)).logits[:, -1]


def read(model, cache, tokens, *, chunk=300):
    for part in tokens.split(chunk, 1):
        found = step(model, cache, part)
    return found


def settle(cache):
    """Learn from what is there, as saving does."""
    for layer in cache.saap_layers:
        layer.store.settle()


def generated(model, cache, tokens, n=20):
    return model.generate(tokens, **over(cache), max_new_tokens=n, do_sample=False)


@pytest.mark.parametrize("fast_memory", [None, FAST, 2**30])
@pytest.mark.parametrize("share", ["group", "head"])
def test_the_same_as_in_memory(tiny_model, long_tokens, tmp_path, fast_memory, share):
    budget = Budget(max_tokens=64, n_sink=4, window=16, flush_every=8, share=share)
    with saap.attached(tiny_model, budget=budget) as attached:
        inside = attached.cache()
        cache = attached.cache(directory=tmp_path / "new" / "folder", fast_memory=fast_memory)
        for tokens in long_tokens[:, :700].split(250, 1):
            assert torch.equal(*(step(tiny_model, c, tokens) for c in (inside, cache)))
        for n in range(700, 760):
            token = long_tokens[:, n : n + 1]
            assert torch.equal(*(step(tiny_model, c, token) for c in (inside, cache)))
        assert 0 < cache.visited_share < 0.5
        for c in (inside, cache):  # the last answer again, and another turn
            c.crop(-40)
        turn = long_tokens[:, 730:800]
        assert torch.equal(*(step(tiny_model, c, turn) for c in (inside, cache)))
        for n in range(20):
            token = long_tokens[:, n : n + 1]
            assert torch.equal(*(step(tiny_model, c, token) for c in (inside, cache)))
    reads = cache.reads
    assert cache.file_bytes >= LAYERS * ROW * 810 > 0
    assert reads.bytes_written == LAYERS * ROW * 850
    if fast_memory is None:
        assert reads.asked == 0
        assert cache.nbytes < inside.nbytes / 2
    else:
        assert reads.bytes_read == (reads.asked - reads.hits) * ROW // 2
        assert 0.2 < reads.hit_rate < (1 if fast_memory == 2**30 else 0.95)
    if fast_memory == FAST:
        assert cache.nbytes < inside.nbytes / 1.5


@pytest.mark.parametrize("method", ["saap", "dense"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_saved_folder_goes_on(long_tokens, tmp_path, method, family):
    family, overrides = FAMILIES[family]
    model = random_model(family, **overrides)
    tokens = long_tokens[:, :640]
    options = {"budget": BUDGET, "method": method}
    with saap.attached(model, **options) as attached:
        cache = attached.cache(directory=tmp_path, fast_memory=FAST)
        read(model, cache, tokens)
        attached.save_context(cache, tokens[0], tmp_path, {"title": "a"})
        expected = generated(model, cache, torch.cat([tokens, tokens[:, :3]], 1))
        cache.close()
    context_folder.verify(tmp_path)
    for n_more in (0, 30):
        with saap.attached(model, **options) as attached:
            again, held = attached.open_context(tmp_path, fast_memory=FAST)
            assert torch.equal(held, tokens[0])
            found = generated(model, again, torch.cat([tokens, tokens[:, :3]], 1))
            assert torch.equal(found, expected)
            if n_more:  # saved again with what was generated, it goes on from there
                more = found[0, : again.lengths[0]]
                attached.save_context(again, more, tmp_path)
                want = generated(model, again, found)
                again.close()
                third, held = attached.open_context(tmp_path)
                assert torch.equal(held, more)
                assert torch.equal(generated(model, third, found), want)
                third.close()
                context_folder.verify(tmp_path)
            again.close()


def test_what_is_cut_off_is_cut_from_what_is_saved(tiny_model, long_tokens, tmp_path):
    """Rows that a save counts on are never written over before it counts on them no longer."""
    with saap.attached(tiny_model, budget=BUDGET) as attached:
        cache = attached.cache(directory=tmp_path)
        read(tiny_model, cache, long_tokens[:, :700])
        attached.save_context(cache, long_tokens[0, :700], tmp_path)
        step(tiny_model, cache, long_tokens[:, 700:720])
        cache.crop(-60)
        step(tiny_model, cache, long_tokens[:, :9])  # written over rows 660 to 668
        cache.close()
        again, held = attached.open_context(tmp_path)
        assert torch.equal(held, long_tokens[0, :660])
        inside = attached.cache()
        read(tiny_model, inside, long_tokens[:, :700])
        settle(inside)
        inside.crop(-40)
        for n in range(10, 30):
            token = long_tokens[:, n : n + 1]
            assert torch.equal(*(step(tiny_model, c, token) for c in (again, inside)))
        with pytest.raises(ValueError, match=r"rows from 660 on may be written.*got row 0"):
            again.layers[0].store.rows.write(0, 0, tuple(torch.zeros(2, 2, 1, 16)), 0)
        again.reset()
        step(tiny_model, again, long_tokens[:, :9])
        again.close()
        with pytest.raises(
            ValueError, match="that `save_context` has saved a context in; got one"
        ):
            attached.open_context(tmp_path)


KILLED = """
import os, sys, torch, saap
from tests.conftest import random_model
from tests.test_context_folder import BUDGET, read, step
model = random_model("llama")
tokens = torch.load(sys.argv[2])
with saap.attached(model, budget=BUDGET) as attached:
    cache = attached.cache(directory=sys.argv[1])
    read(model, cache, tokens[:, :600])
    attached.save_context(cache, tokens[0, :600], sys.argv[1])
    print("saved", flush=True)
    for n in range(10**9):
        step(model, cache, tokens[:, n % 700 : n % 700 + 1])
        if n == 30:
            print("on", flush=True)
"""


def test_a_killed_process_leaves_what_it_saved(tiny_model, long_tokens, tmp_path):
    folder, tokens = tmp_path / "context", tmp_path / "tokens.pt"
    torch.save(long_tokens, tokens)
    command = [sys.executable, "-c", textwrap.dedent(KILLED), folder, tokens]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process,
        contextlib.ExitStack() as on_exit,
        saap.attached(tiny_model, budget=BUDGET) as attached,
    ):
        on_exit.callback(process.kill)  # else a test that fails waits for it
        assert process.stdout.readline() == "saved\n"
        for use in (
            lambda: attached.open_context(folder),
            lambda: attached.cache(directory=folder),
        ):
            with pytest.raises(ValueError, match="used by one cache at a time; got a second"):
                use()
        assert process.stdout.readline() == "on\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
        cache, held = attached.open_context(folder)
        assert torch.equal(held, long_tokens[0, :600])
        whole = attached.cache()
        read(tiny_model, whole, long_tokens[:, :600])
        settle(whole)
        for n in range(600, 660):
            token = long_tokens[:, n : n + 1]
            assert torch.equal(*(step(tiny_model, c, token) for c in (cache, whole)))
        cache.close()
        context_folder.verify(folder)


@pytest.mark.parametrize("how", ["no space", "file size"])
def test_a_full_disk_changes_nothing(tiny_model, long_tokens, tmp_path, monkeypatch, how):
    with saap.attached(tiny_model, budget=BUDGET) as attached:
        cache = attached.cache(directory=tmp_path)
        read(tiny_model, cache, long_tokens[:, :700])
        attached.save_context(cache, long_tokens[0, :700], tmp_path)
        room = cache.layers[1].store.rows.capacity - 700
        before = [(tmp_path / f"layer-000{n}.rows").stat().st_size for n in range(2)]
        tokens = long_tokens[:, : room + 1]
        if how == "no space":

            def full(file, place, n_bytes):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            monkeypatch.setattr(row_file, "_allocate", full)
            with pytest.raises(ValueError, match=r"0000.rows: .* bytes more; got No space left"):
                step(tiny_model, cache, tokens)
            monkeypatch.undo()
        else:
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] + 1000, hard))
            try:
                with pytest.raises(ValueError, match="bytes more; got File too large"):
                    step(tiny_model, cache, tokens)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        after = [(tmp_path / f"layer-000{n}.rows").stat().st_size for n in range(2)]
        assert after == before
        inside = attached.cache()  # it goes on, when there is room
        read(tiny_model, inside, long_tokens[:, :700])
        assert torch.equal(*(step(tiny_model, c, tokens) for c in (cache, inside)))


def test_files_that_are_not_whole_are_refused(tiny_model, long_tokens, tmp_path):
    path = tmp_path / "context"
    with saap.attached(tiny_model, budget=BUDGET) as attached:
        cache = attached.cache(directory=path)
        read(tiny_model, cache, long_tokens[:, :700])
        attached.save_context(cache, long_tokens[0, :700], path)
        cache.close()
        rows = path / "layer-0001.rows"
        whole = rows.read_bytes()
        other = (path / "layer-0000.rows").read_bytes()
        changed = bytearray(whole)
        changed[row_file.HEADER + 300 * ROW] ^= 1
        rows.write_bytes(changed)
        with pytest.raises(ValueError, match=r"0001\.rows: its first 700 rows must fit"):
            context_folder.verify(path)
        for content, said in (
            (whole[: row_file.HEADER + 699 * ROW], r"0001.rows: must hold rows .* cut short"),
            (whole[:100], r"0001.rows: must be rows of a context, version 1; got another"),
            (b"", r"0001.rows: must be rows of a context, version 1; got another"),
            (other, r"0001.rows: must be layer 1 of this context, 2 KV heads of 16; got another"),
            (whole.replace(b'"layer": 1', b'"layer": 2', 1), r"must be layer 1 of this context"),
        ):
            rows.write_bytes(content)
            with pytest.raises(ValueError, match=said):
                attached.open_context(path)
        rows.unlink()
        with pytest.raises(ValueError, match=r"0001.rows: cannot be opened \(No such file"):
            attached.open_context(path)
        rows.write_bytes(whole)
        state = (path / "context").read_bytes()
        (path / "context").write_bytes(state[: len(state) // 2])
        with pytest.raises(ValueError, match=r"must be a whole safetensors file"):
            attached.open_context(path)
        (path / "context").write_bytes(state)
        attached.open_context(path)[0].close()
    others = (
        ({"method": "dense"}, {}, "with this budget; got .*method is saap, not dense"),
        ({}, {"kv_dtype": torch.bfloat16}, "with this budget; got .*kv_dtype is None"),
    )
    for options, more, said in others:
        with (
            saap.attached(tiny_model, budget=BUDGET, **options, **more) as attached,
            pytest.raises(ValueError, match=said),
        ):
            attached.open_context(path)
    with (
        saap.attached(random_model("qwen2"), budget=BUDGET) as attached,
        pytest.raises(ValueError, match=r"with this model; got .*model_type is llama, not qwen2"),
    ):
        attached.open_context(path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
def test_narrower_rows(tiny_model, long_tokens, tmp_path, dtype):
    with saap.attached(tiny_model, budget=BUDGET, kv_dtype=dtype) as attached:
        inside, cache = attached.cache(), attached.cache(directory=tmp_path, fast_memory=FAST)
        for c in (inside, cache):
            read(tiny_model, c, long_tokens[:, :700])
        for n in range(700, 740):
            token = long_tokens[:, n : n + 1]
            assert torch.equal(*(step(tiny_model, c, token) for c in (inside, cache)))
        attached.save_context(cache, torch.cat([long_tokens[0, :740]]), tmp_path)
        cache.close()
        again, _ = attached.open_context(tmp_path)
        assert torch.equal(*(step(tiny_model, c, long_tokens[:, :1]) for c in (inside, again)))
    width = 16 + 4 if dtype == torch.int8 else 16
    assert cache.reads.bytes_written == LAYERS * 740 * ROW * width * dtype.itemsize // (16 * 4)


@pytest.mark.bad_input
def test_what_is_refused(tiny_model, tiny_index, long_tokens, tiny_tokens, tmp_path):
    with saap.attached(tiny_model, budget=BUDGET) as attached:
        (tmp_path / "file").write_text("")
        least = LAYERS * 2 * (4 + 16 + 8 + 64) * (2 * 16 * 4 + 13)
        for options, said in (
            ({"directory": tmp_path}, f"{tmp_path}: must be a new or an empty folder; got file"),
            ({"directory": tmp_path / "file"}, "file: cannot be written"),
            ({"directory": "/proc/saap"}, r"/proc/saap: cannot be written"),
            ({"fast_memory": 2**30}, "fast_memory must be None without a directory"),
            ({"directory": tmp_path / "a", "fast_memory": least - 1}, f"at least {least:,} bytes"),
            ({"directory": tmp_path / "a", "fast_memory": "1GB"}, r"at least .* got '1GB'"),
        ):
            with pytest.raises(ValueError, match=said):
                attached.cache(**options)
        cache = attached.cache(directory=tmp_path / "a", fast_memory=least)
        with pytest.raises(ValueError, match="one sequence; got a batch of 2"):
            step(tiny_model, cache, tiny_tokens[:2])
        cache = attached.cache(directory=tmp_path / "b")
        step(tiny_model, cache, long_tokens[:, :20])
        with pytest.raises(ValueError, match="must stay one sequence; got sequences"):
            cache.reorder_cache(torch.tensor([0, 0]))
        with pytest.raises(ValueError, match=r"must be saved there, in .*b; got .*c"):
            attached.save_context(cache, long_tokens[0, :20], tmp_path / "c")
        with pytest.raises(ValueError, match="must stay the only one there; got a copy"):
            copy.deepcopy(cache)
        attached.save_context(cache, long_tokens[0, :20], tmp_path / "b")
        cache.close()
        with pytest.raises(ValueError, match="got a saved context: open it with open_context"):
            attached.cache(directory=tmp_path / "b")
        for path, said in (("none", "got no such file"), ("b/lock", "whole safetensors")):
            with pytest.raises(ValueError, match=said):
                attached.open_context(tmp_path / path)
    with (
        saap.attached(tiny_model, tiny_index, Budget(nprobe=2), method="kmeans") as attached,
        pytest.raises(ValueError, match="needs method saap or dense"),
    ):
        attached.cache(directory=tmp_path / "d")


@pytest.mark.parametrize("how", ["moved", "replaced"])
def test_a_folder_that_went_elsewhere_keeps_what_it_was_saved_as(
    tiny_model, long_tokens, tmp_path, how
):
    """Its rows would be written over, and the file that counts them not be found."""
    here, there = tmp_path / "here", tmp_path / "there"
    with saap.attached(tiny_model, budget=BUDGET) as attached:
        cache = attached.cache(directory=here)
        read(tiny_model, cache, long_tokens[:, :100])
        attached.save_context(cache, long_tokens[0, :100], here)
        here.rename(there)
        if how == "replaced":
            here.mkdir()
        cache.crop(-60)
        told = "must stay where it is while a cache uses it; got a folder that was moved"
        with pytest.raises(ValueError, match=told):
            step(tiny_model, cache, long_tokens[:, 200:230])
        cache.close()
        again, held = attached.open_context(there)
        assert torch.equal(held, long_tokens[0, :100])
        inside = attached.cache()
        read(tiny_model, inside, long_tokens[:, :100])
        token = long_tokens[:, 300:301]
        assert torch.equal(*(step(tiny_model, c, token) for c in (again, inside)))
        again.close()


def saved_here(attached, model, tokens):
    """A cache whose context is saved in the folder that it keeps its rows in."""
    cache = attached.cache(directory="here")
    read(model, cache, tokens[:, :100])
    attached.save_context(cache, tokens[0, :100], "here")
    return cache


def test_a_process_that_goes_elsewhere_finds_its_folder(
    tiny_model, long_tokens, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with saap.attached(tiny_model, budget=BUDGET) as attached:
        cache = saved_here(attached, tiny_model, long_tokens)
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        cache.reset()
        step(tiny_model, cache, long_tokens[:, 200:300])
        attached.save_context(cache, long_tokens[0, 200:300], tmp_path / "here")
        cache.close()
        again, held = attached.open_context("../here")
        assert torch.equal(held, long_tokens[0, 200:300])
        again.close()


def test_what_is_wrong_with_a_folder_is_told_once_however_it_is_named(
    tiny_model, long_tokens, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with saap.attached(tiny_model, budget=BUDGET) as attached:
        cache = saved_here(attached, tiny_model, long_tokens)
        cache.close()
        (tmp_path / "here" / "layer-0001.rows").unlink()
        with pytest.raises(ValueError, match=r"layer-0001\.rows: cannot be opened") as refused:
            attached.open_context("here")
        assert str(refused.value).startswith(str(tmp_path / "here" / "layer-0001.rows"))
        assert "altered" not in str(refused.value)


KILLED_SAVING = """
import os, signal, sys, torch, saap
from saap.index import atomic_files
from tests.conftest import random_model
from tests.test_context_folder import BUDGET, read
atomic_files.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
model = random_model("llama")
tokens = torch.load(sys.argv[2])[:, :100]
with saap.attached(model, budget=BUDGET) as attached:
    cache = attached.cache(directory=sys.argv[1])
    read(model, cache, tokens)
    attached.save_context(cache, tokens[0], sys.argv[1])
"""


def test_a_folder_whose_first_save_was_killed_is_as_a_new_one(tiny_model, long_tokens, tmp_path):
    path, given = tmp_path / "context", tmp_path / "tokens.pt"
    torch.save(long_tokens, given)
    command = [sys.executable, "-c", KILLED_SAVING, str(path), str(given)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert list(path.glob(".*.part"))
    with saap.attached(tiny_model, budget=BUDGET) as attached:
        cache = attached.cache(directory=path)
        assert not list(path.glob(".*.part"))
        read(tiny_model, cache, long_tokens[:, :100])
        attached.save_context(cache, long_tokens[0, :100], path)
        cache.close()
        attached.open_context(path)[0].close()
