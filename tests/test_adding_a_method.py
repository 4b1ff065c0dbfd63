"""The example of the guide is a method: in generate(), exact at full budget, swept, reported."""

import re
from pathlib import Path

import pytest
import torch

import saap
from saap.budget import Budget
from saap.eval.run import EvalConfig
from saap.eval.tasks.attention import evaluate
from saap.eval.variants import make_variants
from saap.hf import over
from saap.kv import KVStore
from saap.methods import METHODS

GUIDE = Path(__file__).resolve().parents[1] / "docs" / "adding_a_method.md"
PLACES = {"n_sink": 4, "window": 16, "flush_every": 8}


@pytest.fixture
def norms(monkeypatch):
    code = re.search(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)[1]
    assert len(code.splitlines()) < 40
    names: dict = {"__name__": "saap.methods.norms"}
    exec(compile(code, str(GUIDE), "exec"), names)
    monkeypatch.setitem(METHODS, "norms", names["Norms"])
    monkeypatch.setattr(KVStore, "debug", True)
    return names["Norms"]


def generated(model, tokens, method, budget, n_tokens=12):
    with saap.attached(model, method=method, budget=budget) as saap_model:
        cache = saap_model.cache()
        out = model.generate(
            tokens,
            **over(cache),
            max_new_tokens=n_tokens,
            min_new_tokens=n_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return torch.stack(out.logits), cache.visited_share


@pytest.mark.parametrize("share", ["group", "head"])
def test_the_example_generates(norms, tiny_model, tiny_tokens, share):
    tokens = tiny_tokens[:1, :200]
    dense, _ = generated(tiny_model, tokens, "dense", Budget(max_tokens=0, **PLACES))
    full, visited = generated(
        tiny_model, tokens, norms(), Budget(max_tokens=300, share=share, **PLACES)
    )
    assert visited == 1.0
    assert (full - dense).abs().max() < 1e-4 * float(dense.abs().max())
    few, visited = generated(
        tiny_model, tokens, "norms", Budget(max_tokens=40, share=share, **PLACES)
    )
    assert (40 + 4 + 16) / 212 <= visited < (40 + 4 + 16 + 8) / 200
    assert torch.equal(few[0], dense[0])  # the prompt is dense
    assert not torch.allclose(few[1:], dense[1:], rtol=1e-4)


def test_the_example_is_swept(norms, reference_model, reference_tokenizer):
    from saap.eval import reference
    from saap.eval.tasks.base import text_tokens

    entry = {"name": "norms", "build": {"power": [1.0, -1.0]}}
    config = EvalConfig(methods=("dense", entry), contexts=(512,))
    variants = make_variants(config.methods, None, 0)
    assert [a.label for a in variants] == ["dense", "norms[power=1.0]", "norms[power=-1.0]"]
    tokens = text_tokens(reference_tokenizer, reference.split_held_out()[1], 512, 0, 1)
    points = [(a, a.points((0.3,), 504, "group")) for a in variants]
    records = evaluate(reference_model, tokens, points, 8)
    caught = {r["method"]: sum(r["middle_caught"]) for r in records if r["layer"] == 1}
    assert caught["norms[power=1.0]"] != caught["norms[power=-1.0]"]
    assert all(v <= caught["dense"] for v in caught.values())
