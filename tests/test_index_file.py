"""The file of a TrainedIndex: what it may hold follows from its header, which is signed, too."""

import json

import pytest
import torch

from saap import TrainedIndex, index_file
from saap.index import tensor_files


@pytest.fixture
def path(tiny_index, tmp_path):
    path = tmp_path / "index.safetensors"
    tiny_index.save(path)
    return path


def forged(path, change):
    """The file with header and tensors changed, and every checksum made good."""
    header, tensors = tensor_files.read(path, index_file.FORMAT)
    tensors = {name: t.clone() for name, t in tensors.items()}
    change(header, tensors)
    tensor_files.write(path, index_file.FORMAT, header, tensors)


def set_header(**values):
    return lambda header, _: header.update(values)


def set_model(**values):
    return lambda header, _: header["model"].update(values)


def without(*names):
    def change(header, tensors):
        for name in names:
            header.pop(name, None)
            tensors.pop(name, None)

    return change


def replaced(name, make):
    return lambda _, tensors: tensors.update({name: make(tensors[name])})


def filled(name, value):
    return lambda _, tensors: tensors[name].fill_(value)


L0 = "layers.0."
FORGED = {
    "no model": (without("model"), "its header must hold model; got none"),
    "model is text": (set_header(model="llama"), "its header's model must be a table"),
    "no layers": (set_model(num_layers=0), "num_layers as an integer from 1"),
    "too many layers": (set_model(num_layers=10**9), "num_layers as an integer from 1"),
    "layers as text": (set_model(num_layers="2"), "num_layers as an integer from 1 to 65536; got"),
    "fewer layers": (set_model(num_layers=1), "sm_scale as a list of 1 positive numbers"),
    "heads": (set_model(num_heads=3), "num_heads as a multiple of num_kv_heads=2; got 3"),
    "head_dim": (set_model(head_dim=32), r"layers.0.centroids must be float32 \[2, 16, 32\]"),
    "norms": (set_model(attention_norms=[1.0]), "attention_norms as a list of 2 finite numbers"),
    "nlist": (set_header(nlist=0), "nlist as an integer from 1 to 65536; got 0"),
    "nlist too large": (set_header(nlist=65537), "nlist as an integer from 1 to 65536; got 65537"),
    "other nlist": (set_header(nlist=8), r"centroids must be float32 \[2, 8, 16\], by its header"),
    "segments": (set_header(n_segments=0), "n_segments as an integer from 1 to 4096; got 0"),
    "many segments": (set_header(n_segments=4097), "n_segments as an integer from 1 to 4096"),
    "interleaved": (set_header(interleaved=0), "interleaved as true or false; got 0"),
    "sm_scale": (set_header(sm_scale=[0.25, 0.0]), "sm_scale as a list of 2 positive numbers"),
    "inf": (set_header(sm_scale=[0.25, float("inf")]), "sm_scale as a list of 2 positive"),
    "sm_scale a number": (set_header(sm_scale=0.25), "sm_scale as a list of 2 positive numbers"),
    "router": (set_header(router="tree"), "router as 'mlp' or 'linear' or 'centroid'"),
    "router a list": (set_header(router=["mlp"]), r"router as text; got \['mlp'\]"),
    "window": (set_header(window=-1), "window as an integer from 0"),
    "no window": (without("window"), "its header must hold window; got none"),
    "recall": (set_header(recall={"mlp": [3]}), "mlp as a list of 2"),
    "recall text": (set_header(recall={"mlp": ["a", "b"]}), "layer 0 as a list of 4 finite"),
    "no centroids": (without(L0 + "centroids"), r"layers.0.centroids must be .*; got none"),
    "no key_scale": (without(L0 + "key_scale"), r"layers.0.key_scale must be .*; got none"),
    "no w1": (without(L0 + "mlp.w1"), r"layers.0.mlp.w1 must be .*; got none"),
    "no layer at all": (lambda h, t: t.clear(), "at least one layer must be trained"),
    "a tensor more": (
        lambda h, t: t.update({"x": torch.zeros(3)}), "x must not be there, by its header"
    ),
    "a layer more": (
        lambda h, t: t.update({"layers.7.centroids": torch.zeros(3)}),
        "layers.7.centroids must not be there",
    ),
    "NaN": (filled(L0 + "centroids", torch.nan), "layers.0.centroids must be finite; got NaN"),
    "inf in weights": (filled(L0 + "linear.weight", torch.inf), "linear.weight must be finite"),
    "NaN frequencies": (filled(L0 + "inv_freq", torch.nan), "inv_freq must be finite"),
    "long inv_freq": (
        replaced(L0 + "inv_freq", lambda t: torch.ones(64)),
        r"inv_freq must be float32 \[8\], by its header; got float32 \[64\]",
    ),
    "flat inv_freq": (
        replaced(L0 + "inv_freq", lambda t: torch.ones(2, 2)), r"inv_freq must be float32 \[0\]"
    ),
    "few key scales": (
        replaced(L0 + "key_scale", lambda t: t[:, :3].clone()),
        r"key_scale must be float32 \[2, 16\], by its header; got float32 \[2, 3\]",
    ),
    "half": (replaced(L0 + "centroids", torch.Tensor.half), "centroids must be float32 .*float16"),
    "int8 without scale": (
        without(L0 + "mlp.w2_scale"), "mlp.w2 must be float32 .*got int8"
    ),
    "short w1": (
        replaced(L0 + "mlp.w1", lambda t: t[:, :3].clone()), r"mlp.b1 must be float32 \[4, 3\]"
    ),
    "flat w1": (replaced(L0 + "mlp.w1", lambda t: t.flatten()), r"mlp.w1 must be float32 \[4, 1,"),
}  # fmt: skip


@pytest.mark.parametrize("case", FORGED)
def test_forged_files_are_refused_in_one_line(path, case):
    change, message = FORGED[case]
    forged(path, change)
    with pytest.raises(ValueError, match=message) as error:
        TrainedIndex.load(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_a_layer_that_was_not_trained_is_left_out_as_a_whole(path):
    forged(path, lambda _, t: [t.pop(n) for n in list(t) if n.startswith(L0)])
    index = TrainedIndex.load(path)
    assert index.layers[0] is None
    assert index.layers[1] is not None


@pytest.mark.parametrize("name", ["sm_scale", "window", "n_segments", "head_dim"])
def test_a_header_altered_in_place_is_found(path, name):
    data = path.read_bytes()
    start = data.index(b'\\"' + name.encode())
    place = next(i for i in range(start + len(name), len(data)) if data[i : i + 1] in b"12345678")
    path.write_bytes(data[:place] + b"9" + data[place + 1 :])
    with pytest.raises(ValueError, match="its header must fit its checksum"):
        TrainedIndex.load(path)


def test_a_file_of_an_older_version_says_what_makes_a_new_one(path):
    data = path.read_bytes()
    path.write_bytes(data.replace(b'\\"format_version\\": 3', b'\\"format_version\\": 2'))
    message = "its format version must be 3; got 2: make it again with `saap train`"
    with pytest.raises(ValueError, match=message):
        TrainedIndex.load(path)


def test_quantized_routers_are_held(tiny_index, path):
    layers = [
        type(own)(**{**vars(own), "routers": {"mlp": own.routers["mlp"].quantized()}})
        for own in tiny_index.layers
    ]
    index = TrainedIndex(tuple(layers), tiny_index.metadata)
    index.save(path)
    loaded = TrainedIndex.load(path)
    assert loaded.layers[0].routers["mlp"].w2.dtype == torch.int8
    assert loaded.fingerprint == index.fingerprint
    assert index.fingerprint != tiny_index.fingerprint
    assert json.loads(json.dumps(index.metadata)) == loaded.metadata
