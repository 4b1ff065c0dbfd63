"""A caller's `torch.set_default_dtype`: the same numbers, whatever it is."""

import ast
from pathlib import Path

import pytest
import torch

import saap
from saap.budget import Budget
from saap.hf import over
from saap.kv import KVStore
from saap.methods import METHODS
from saap.selector import LayerInfo

from .conftest import random_model
from .test_generate import make, prompt, random_index
from .torch_threads import torch_setting

pytestmark = pytest.mark.many_steps

ROOT = Path(__file__).parents[1]
MAKERS = set("empty eye full linspace logspace normal ones rand randn zeros".split())
WITHOUT = [name for name, method in METHODS.items() if not method.needs_index]
DIM, BUDGET = 32, Budget(max_tokens=40, n_sink=4, window=16)


def default(dtype):
    return torch_setting("default_dtype", dtype)


def makes_of(path: Path):
    """Tensors that a file makes without a word on their dtype: line and expression."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        own = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
        named = {keyword.arg for keyword in node.keywords} & {"dtype", "out", None}
        of_integers = node.func.attr == "full" and not isinstance(node.args[1], ast.UnaryOp)
        if own and node.func.attr in MAKERS and not named and not of_integers:
            yield f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"


def test_every_new_tensor_of_floats_names_its_dtype():
    files = [p for top in ("saap", "index", "kernels") for p in (ROOT / top).rglob("*.py")]
    assert [make for path in files for make in makes_of(path)] == []


def steps(method: str, dtype: torch.dtype, n: int = 1100) -> list[torch.Tensor]:
    """What a store gives for a prompt and a few tokens after it, under this default."""
    generator = torch.Generator().manual_seed(1)
    options = {"generator": generator, "dtype": torch.float32}
    k, v = (torch.randn(2, 2, n, DIM, **options) for _ in "kv")
    q = torch.randn(2, 4, n, DIM, **options)
    found = []
    with default(dtype):
        inv_freq = 1e4 ** -(torch.arange(0, DIM, 2, dtype=torch.float32) / DIM)
        layer = LayerInfo(sm_scale=DIM**-0.5, inv_freq=inv_freq)
        store = KVStore(METHODS[method]().selector(layer), BUDGET)
        for first, last in ((0, n - 4), *((at, at + 1) for at in range(n - 4, n))):
            part = slice(first, last)
            k_new, v_new, q_new = (t[:, :, part] for t in (k, v, q))
            found += store.step(k_new, v_new, k_new, q_new, q_new)
    return found


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", WITHOUT)
def test_methods_give_the_same_under_any_default(method, dtype):
    for own, other in zip(steps(method, torch.float32), steps(method, dtype), strict=True):
        assert own.dtype == other.dtype
        assert torch.equal(own, other)


def logits(model, saap_model, tokens, dtype):
    with default(dtype):
        cache = saap_model.cache()
        return [
            model(part, **over(cache)).logits
            for part in (tokens[:, :-3], *tokens[:, -3:].split(1, 1))
        ]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", ["kmeans", "blend", "oracle"])
def test_trained_methods_give_the_same_under_any_default(method, dtype):
    model, tokens = make("llama"), prompt(1, 90)
    index, budget = random_index(model), Budget(nprobe=2, n_sink=4, window=8)
    with saap.attached(model, index, budget, method=method) as saap_model:
        expected = logits(model, saap_model, tokens, torch.float32)
        found = logits(model, saap_model, tokens, dtype)
    assert all(torch.equal(own, other) for own, other in zip(expected, found, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt_oss", "gemma2", "falcon_h1"])
def test_models_give_the_same_under_a_default_of_16_bits(family):
    """With learned sinks, capped scores, states; padded."""
    model = make(family) if family != "falcon_h1" else random_model(family)
    tokens = prompt(2, 40)
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    with saap.attached(model, budget=BUDGET) as saap_model:
        found = []
        for dtype in (torch.float32, torch.bfloat16):
            with default(dtype):
                found.append(model(tokens, attention_mask=mask, **over(saap_model.cache())).logits)
    assert found[0].dtype == found[1].dtype
    used = mask.bool()
    assert (found[0][used] - found[1][used]).abs().max() < 1e-5
