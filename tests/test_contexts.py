"""Contexts on disk: the same answers as without the round trip; other files are refused."""

import dataclasses
import json

import pytest
import torch

import saap
from saap import context_file
from saap.budget import Budget
from saap.hf import over
from saap.index import tensor_files

from .test_generate import FULL, generated, make, prompt, random_index

pytestmark = pytest.mark.many_steps

SMALL = Budget(nprobe=2, n_sink=4, window=8, flush_every=8)


@pytest.fixture(scope="module", params=["llama", "gemma3", "smollm3"])
def case(request):
    model = make(request.param)
    return model, random_index(model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model, its index and a context file of 100 tokens."""
    model = make("llama")
    index = random_index(model)
    path = tmp_path_factory.mktemp("contexts") / "document.safetensors"
    with saap.attached(model, index, SMALL, method="blend") as saap_model:
        read(saap_model, prompt(1, 100), path)
    return model, index, path


def read(saap_model, tokens, path=None):
    """A cache that holds the tokens; written to the path as well."""
    cache = saap_model.cache()
    with torch.no_grad():
        for part in tokens.split(37, 1):
            saap_model.model(part, **over(cache))
    if path is not None:
        saap_model.save_context(cache, tokens[0], path)
    return cache


def answer(saap_model, cache, tokens, question):
    tokens = torch.cat([tokens.view(1, -1), question], 1)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return generated(saap_model.model, inputs, **over(cache), max_new_tokens=30)


@pytest.mark.parametrize("budget", [FULL, SMALL])
def test_answer_is_that_without_the_round_trip(case, budget, tmp_path):
    model, index = case
    tokens, question = prompt(1, 100), prompt(1, 7, seed=4)
    path = tmp_path / "document.safetensors"
    with saap.attached(model, index, budget, method="blend") as saap_model:
        kept = read(saap_model, tokens, path)
        expected = answer(saap_model, kept, tokens, question)
    before = path.read_bytes()
    with saap.attached(model, index, budget, method="blend") as saap_model:
        for _ in range(2):  # the first answer leaves the file as it was
            cache, held = saap_model.open_context(path)
            assert torch.equal(held, tokens[0])
            assert torch.equal(answer(saap_model, cache, held, question), expected)
            for mine, theirs in zip(cache.saap_layers, kept.saap_layers, strict=True):
                n = theirs.store.length
                assert torch.equal(mine.store.k[:, :, :n], theirs.store.k[:, :, :n])
                assert torch.equal(
                    mine.store.rows.tokens[..., :n], theirs.store.rows.tokens[..., :n]
                )
    assert path.read_bytes() == before
    context_file.verify(path)


@pytest.mark.parametrize("directory", [False, True])
def test_an_opened_context_is_repeated(tmp_path, directory):
    """Before any forward over it; a folder holds one sequence and stays as it is."""
    model, tokens, path = make("gemma3"), prompt(1, 60), tmp_path / "document"
    budget = Budget(max_tokens=10_000, n_sink=4, window=8)
    with saap.attached(model, budget=budget) as saap_model, torch.no_grad():
        cache = saap_model.cache(directory=path if directory else None)
        model(tokens[:, :50], **over(cache))
        saap_model.save_context(cache, tokens[0, :50], path)
        cache.close()
        cache, _ = saap_model.open_context(path)
        assert cache.lengths == [50]
        n = 1 if directory else 3
        cache.batch_repeat_interleave(n)
        found = model(tokens[:, 50:].expand(n, -1), **over(cache)).logits
        assert (found - model(tokens).logits[:, 50:]).abs().max() < 1e-4
        cache.close()


def altered(name, dtype):
    def alter(tensors):
        return tensors | {name: tensors[name].to(dtype)}

    return alter


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (altered("layers.0.rest.centroids", torch.float16), "centroids of the rest must be"),
        (altered("layers.0.rest.sums", torch.float32), "sums of the rest must be"),
        (
            lambda tensors: {
                n: t.half() if n in ("layers.0.k", "layers.0.v") else t for n, t in tensors.items()
            },
            "k must be torch.float32; got torch.float16",
        ),
    ],
)
def test_numbers_of_another_width_are_refused(tmp_path, alter, message):
    model, path = make("llama"), tmp_path / "document"
    budget = Budget(max_tokens=64, n_sink=4, window=8)
    tokens = prompt(1, 701)
    with saap.attached(model, budget=budget) as saap_model:
        cache = read(saap_model, tokens[:, :700])
        with torch.no_grad():
            model(tokens[:, 700:], **over(cache))  # a step, which estimates what it leaves out
        saap_model.save_context(cache, tokens[0], path)
        header, tensors = tensor_files.read(path, context_file.FORMAT)
        assert "layers.0.rest.centroids" in tensors
        tensor_files.write(path, context_file.FORMAT, header, alter(tensors))
        with pytest.raises(ValueError, match=f"{path}: layer 0: {message}"):
            saap_model.open_context(path)


def test_long_answer_outgrows_the_file(saved):
    model, index, path = saved
    with saap.attached(model, index, SMALL, method="blend") as saap_model:
        cache, tokens = saap_model.open_context(path)
        with torch.no_grad():
            for part in prompt(1, 1500, seed=6).split(300, 1):
                model(part, **over(cache))
        assert cache.lengths == [1600]
        plain = read(saap_model, torch.cat([tokens[None], prompt(1, 1500, seed=6)], 1))
        for mine, theirs in zip(cache.saap_layers, plain.saap_layers, strict=True):
            for layer in (mine, theirs):
                layer.store.flush()
            a, b = (x.store.rows.tokens[..., :1600] for x in (mine, theirs))
            assert torch.equal(a, b)


def altered(path, change):
    """The file with its header changed, checksums of the header made good."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + size])
    header = json.loads(head["__metadata__"][context_file.FORMAT.kind])
    change(header)
    header["sha256"] = tensor_files.header_digest(header)
    head["__metadata__"][context_file.FORMAT.kind] = json.dumps(header, sort_keys=True)
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def flipped(path):
    data = bytearray(path.read_bytes())
    data[-5000] ^= 1
    return bytes(data)


BAD_FILES = {
    "cut short": (lambda p: p.read_bytes()[:-100], "must be a whole safetensors file"),
    "empty": (lambda p: b"", "must be a whole safetensors file"),
    "version": (
        lambda p: altered(p, lambda h: h.update(format_version=99)),
        "format version must be 7; got 99: make it again with `saap prefill`",
    ),
    "header": (
        lambda p: p.read_bytes().replace(b'\\"window\\": 8', b'\\"window\\": 9'),
        "its header must fit its checksum",
    ),
    "index": (
        lambda p: altered(p, lambda h: h.update(index="0" * 16)),
        "made with another index",
    ),
    "rows": (
        lambda p: altered(p, lambda h: h["layers"][0].update(middles=[5000])),
        "layer 0: rows must be at most .* got 5000 of 100 rows in lists",
    ),
    "no layers": (
        lambda p: altered(p, lambda h: h.pop("layers")),
        "its header must hold layers; got none",
    ),
    "no batch": (
        lambda p: altered(p, lambda h: h["layers"][0].update(lengths=[], middles=[])),
        "layer 0 must hold middles as one number for each of at least one length",
    ),
    "a batch that its tensors have not": (
        lambda p: altered(p, lambda h: h["layers"][0].update(lengths=[1, 1], middles=[0, 0])),
        r"layers.0.k must be float32 \[2, .*by its header; got float32 \[1, ",
    ),
    "text for lengths": (
        lambda p: altered(p, lambda h: h["layers"][1].update(lengths="9")),
        "layer 1 must hold lengths as a list of integers from 0; got '9'",
    ),
    "layers of another kind": (
        lambda p: altered(p, lambda h: h["layers"][0].update(cumulative_length=3)),
        "layers.0.* must",
    ),
    "lengths": (
        lambda p: altered(p, lambda h: [x.update(lengths=[99]) for x in h["layers"]]),
        r"must hold a row per token; got 100 tokens for \[99\] rows",
    ),
}


@pytest.mark.parametrize("wrong", BAD_FILES)
def test_files_that_do_not_fit_are_refused(saved, tmp_path, wrong):
    model, index, path = saved
    make_bytes, message = BAD_FILES[wrong]
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(make_bytes(path))
    with (
        saap.attached(model, index, SMALL, method="blend") as saap_model,
        pytest.raises(ValueError, match=message),
    ):
        saap_model.open_context(bad)


CHANGES = {
    "lists": (lambda t: t.fill_(12345), r"rows must be in lists 0\.\.\d+; got 12345\.\.12345"),
    "tokens": (lambda t: t.fill_(3), r"rows must be the tokens 0\.\.99, each once"),
    "tokens of the middle": (
        lambda t: t[..., :100].copy_(t[..., :100].flip(-1)),
        "rows must lie in the order of their lists, those of one in time order; got another order",
    ),
    "tokens of the tail": (
        lambda t: t[..., 98:100].copy_(t[..., 98:100].flip(-1)),
        "rows outside the middle must be in time order; got another order",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_rows_that_somebody_made_up_are_refused(saved, tmp_path, name):
    """Every checksum fits."""
    model, index, path = saved
    change, message = CHANGES[name]
    header, tensors = context_file.read(path)
    change(tensors[f"layers.0.{name.split()[0]}"])
    bad = tmp_path / "bad.safetensors"
    context_file.write(bad, header, tensors)
    with (
        saap.attached(model, index, SMALL, method="blend") as saap_model,
        pytest.raises(ValueError, match=message),
    ):
        saap_model.open_context(bad)


def test_verify_finds_altered_keys(saved, tmp_path):
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(flipped(saved[2]))
    with pytest.raises(
        ValueError, match="must fit its checksum; got another: the file was altered"
    ):
        context_file.verify(bad)


def test_other_model_index_or_layout_is_refused(saved, tmp_path):
    model, index, path = saved
    other = make("qwen2")
    with (
        saap.attached(other, random_index(other), SMALL, method="blend") as saap_model,
        pytest.raises(ValueError, match=r"made with another model \(model_type is llama"),
    ):
        saap_model.open_context(path)
    with (
        saap.attached(
            model, index, dataclasses.replace(SMALL, window=9), method="blend"
        ) as saap_model,
        pytest.raises(ValueError, match=r"made with another budget \(window is 8, not 9\)"),
    ):
        saap_model.open_context(path)
    with saap.attached(model, index, SMALL, method="blend") as saap_model:
        with pytest.raises(
            ValueError, match="must be a file that `saap prefill` wrote; got no such file"
        ):
            saap_model.open_context(tmp_path / "none")
        cache = read(saap_model, prompt(1, 20))
        with pytest.raises(
            ValueError, match=r"must hold one sequence of .*; got sequences of \[20\]"
        ):
            saap_model.save_context(cache, prompt(1, 19)[0], tmp_path / "x")
        with pytest.raises(ValueError, match="cannot be written"):
            saap_model.save_context(cache, prompt(1, 20)[0], tmp_path / "no" / "x")
    with (
        saap.attached(model, index, SMALL, method="blend") as saap_model,
        pytest.raises(ValueError, match="must belong to this model and block; got one of another"),
    ):
        saap_model.save_context(cache, prompt(1, 20)[0], tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
