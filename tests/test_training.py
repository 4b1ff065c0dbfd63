"""Targets, training and the index file."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from saap import TrainedIndex, hf, train
from saap.masses import attention_masses
from saap.training import default_nlist

from .conftest import random_model


def test_masses_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 5, 8, generator=generator)
    k = torch.randn(1, 2, 40, 8, generator=generator)
    buckets = torch.randint(0, 6, (1, 2, 40), generator=generator, dtype=torch.int32)
    places = torch.tensor([3, 12, 20, 33, 39])
    found = attention_masses(q, k, buckets, places, 6, sm_scale=0.35, n_sink=2, window=8, block=2)
    seen_by = [12, 12, 33, 33, 39]  # the middle query of each block of two
    for head in range(4):
        own = buckets[0, head // 2]
        for i, place in enumerate(places.tolist()):
            weights = (q[0, head, i] @ k[0, head // 2, : place + 1].T * 0.35).softmax(-1)
            expected = torch.zeros(7)
            for t in range(place + 1):
                expected[own[t] if 2 <= t <= place - 8 else 6] += weights[t]
            assert (found.buckets[0, head, i] - expected).abs().max() < 1e-6
            sizes = torch.bincount(own[2 : max(2, seen_by[i] - 8 + 1)].long(), minlength=6)
            assert torch.equal(found.sizes[0, head // 2, i // 2], sizes.float())


def test_training_is_seeded_and_learned_routing_helps(tiny_model, tiny_tokens, tiny_index):
    again = train(
        tiny_model, tiny_tokens, nlist=16, steps=20, hidden=16, window=32, baselines=True
    )
    for name, tensor in tiny_index.tensors().items():
        assert torch.equal(tensor, again.tensors()[name]), name
    recall = tiny_index.metadata["recall"]
    oracle = torch.tensor(recall["oracle"])
    for router in ("mlp", "linear", "centroid"):
        assert (torch.tensor(recall[router]) <= oracle + 1e-4).all()


def test_a_list_of_unequal_sequences(tiny_model, tiny_tokens):
    unequal = [tiny_tokens[0], tiny_tokens[1][:200], tiny_tokens[2][:250]]
    index = train(tiny_model, unequal, nlist=8, router="linear", window=16)
    assert index.default_router == "linear"
    assert "mlp" not in index.layers[0].routers


def test_save_and_load(tiny_index, tmp_path):
    path = tmp_path / "index.safetensors"
    tiny_index.save(path)
    loaded = TrainedIndex.load(path)
    assert loaded.metadata == json.loads(json.dumps(tiny_index.metadata))
    for name, tensor in tiny_index.tensors().items():
        assert torch.equal(tensor, loaded.tensors()[name])
    assert [p.name for p in tmp_path.iterdir()] == ["index.safetensors"]


def test_truncated_altered_and_foreign_files(tiny_index, tmp_path):
    path = tmp_path / "index.safetensors"
    tiny_index.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        TrainedIndex.load(path)
    path.write_bytes(whole[:-4] + b"\x01\x02\x03\x04")
    with pytest.raises(ValueError, match="must fit its checksum; got another"):
        TrainedIndex.load(path)
    save_file(load_file(path) if False else {"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="must be a file that `saap train` wrote; got another"):
        TrainedIndex.load(path)
    with pytest.raises(ValueError, match="no such file"):
        TrainedIndex.load(tmp_path / "none")


def test_failed_save_leaves_the_old_file(tiny_index, tmp_path, monkeypatch):
    path = tmp_path / "index.safetensors"
    path.write_bytes(b"old")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("saap.index.atomic_files.os.fsync", full_disk)
    with pytest.raises(ValueError, match="No space left on device"):
        tiny_index.save(path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["index.safetensors"]


def test_index_of_another_model(tiny_index, tiny_model):
    tiny_index.check_model(hf.describe(tiny_model))
    with pytest.raises(ValueError, match="with num_kv_heads 4; got an index with num_kv_heads 2"):
        tiny_index.check_model(hf.describe(random_model("llama", num_key_value_heads=4)))
    other = random_model("llama")
    with torch.no_grad():
        other.model.layers[1].self_attn.k_proj.weight.mul_(1.5)
    with pytest.raises(ValueError, match="trained for this model, with attention_norms"):
        tiny_index.check_model(hf.describe(other))


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (
            torch.zeros(0, 300, dtype=torch.long),
            {},
            "token_ids must be .n, T. or 1-D sequences, none empty; got",
        ),
        (torch.ones(4, 30, dtype=torch.long), {"nlist": 16}, "lower nlist or bring more text"),
        (
            torch.ones(4, 600, dtype=torch.long),
            {},
            "at most the model's max_position_embeddings=.* tokens; got 600",
        ),
        (
            torch.ones(4, 300, dtype=torch.long),
            {"router": "tree"},
            "router must be one of .*; got 'tree'",
        ),
    ],
)
def test_bad_training_input(tiny_model, tokens, options, message):
    with pytest.raises(ValueError, match=message):
        train(tiny_model, tokens, **options)


def test_rules():
    contexts = (100, 2048, 8192, 32768, 500_000)
    assert [default_nlist(n) for n in contexts] == [16, 64, 256, 1024, 1024]
