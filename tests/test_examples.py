"""The examples do what they say."""

import importlib.util
from pathlib import Path

import torch

from saap.budget import Budget

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_custom_decoder_is_the_model(reference_model, reference_index, tmp_path):
    custom = example("custom_decoder")
    config = custom.Config.read(custom.FOLDER)
    weights = {
        n: w.float() for n, w in custom.load_file(custom.FOLDER / "model.safetensors").items()
    }
    reference_index.save(tmp_path / "index")
    budget = Budget(max_tokens=120, n_sink=4, window=16, flush_every=16)
    stores = custom.make_stores(config, tmp_path / "index", budget)
    text = custom.default_prompt()[-120:]
    tokens = [custom.BEGIN, *text]
    for caches in (stores, custom.make_stores(config, None, budget)):
        decoder = custom.Decoder(config, weights, caches)
        logits = decoder.forward(tokens[:100])
        for token in tokens[100:]:
            logits = decoder.forward([token])
        with torch.no_grad():
            true = reference_model(torch.tensor([tokens])).logits[0, -1]
        assert (logits - true).abs().max() < 1e-4 * float(true.abs().max())
    assert stores[0].middles[0] > 0
    lines = (EXAMPLES / "custom_decoder.py").read_text().splitlines()
    assert len(lines) <= 200


def test_an_indexed_cache_is_found_again(monkeypatch, capsys, tmp_path):
    path = tmp_path / "index.safetensors"
    monkeypatch.setattr("sys.argv", ["index_a_cache.py", "--tokens", "1024", "--out", str(path)])
    example("index_a_cache").main()
    lines = capsys.readouterr().out.splitlines()
    columns = [line.replace("%", "").split() for line in lines if line.endswith("%")]
    nprobes, visited, routed, nearest = (
        [float(n) for n in column] for column in zip(*columns, strict=True)
    )
    assert nprobes == sorted(nprobes)
    assert visited[-1] == routed[-1] == nearest[-1] == 100.0
    assert all(r > v for r, v in zip(routed[:-1], visited[:-1], strict=True))
    assert any(line.endswith("same: True") for line in lines)
    assert path.exists()
