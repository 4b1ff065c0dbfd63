"""Linear layers over a few rows: the same product in either way, and only where it is meant."""

import pytest
import torch
from torch.nn.functional import linear

from saap.hf import few_rows
from saap.hf.few_rows import FewRows, product, served, serves, weights_left


@pytest.mark.parametrize("shape", [(2, 640), (1, 9, 640), (3, 4, 640)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_on_the_left_are_the_linear_layer(shape, with_bias, dtype):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=draw, dtype=dtype)
    weight = torch.randn(512, 640, generator=draw, dtype=dtype)
    bias = torch.randn(512, generator=draw, dtype=dtype) if with_bias else None
    exact = linear(x.double(), weight.double(), None if bias is None else bias.double())
    found = weights_left(x, weight, bias)
    assert found.shape == exact.shape
    assert found.is_contiguous()
    # Sums of 640 products, rounded in any order, and once more for the bias.
    bound = 640**0.5 * 8 * torch.finfo(torch.float32).eps + 2 * torch.finfo(dtype).eps
    assert (found - exact).norm() <= bound * exact.norm()


@pytest.mark.parametrize("faster", [False, True])
def test_the_faster_way_is_taken_from_then_on(monkeypatch, faster):
    monkeypatch.setattr(few_rows, "_faster", {})
    taken = []

    def left(x, weight, bias=None):
        taken.append("left")
        return weights_left(x, weight, bias)

    seconds = {linear: 3.0, left: 2.0 if faster else 2.9}
    monkeypatch.setattr(few_rows, "weights_left", left)
    monkeypatch.setattr(few_rows, "fastest", lambda call: seconds[call.__defaults__[0]])
    x, weight = torch.randn(1, 5, 640), torch.randn(512, 640)
    for _ in range(2):
        torch.testing.assert_close(product(x, weight), linear(x, weight), atol=1e-4, rtol=1e-4)
    assert taken == ["left", "left"] * faster
    assert len(few_rows._faster) == 1


@torch.no_grad()
def test_layers_within_are_served_and_others_left_alone(monkeypatch):
    seen = []
    monkeypatch.setattr(
        few_rows, "product", lambda *args: seen.append(args[0].shape) or linear(*args)
    )
    layer, small = torch.nn.Linear(640, 512), torch.nn.Linear(64, 64)
    with FewRows():
        for rows in (1, 2, 32, 33):
            layer(torch.randn(1, rows, 640))
        small(torch.randn(1, 5, 64))
        layer(torch.randn(0, 640))
        torch.softmax(torch.randn(4, 640), -1)
    layer(torch.randn(1, 5, 640))
    assert seen == [(1, 2, 640), (1, 32, 640)]


def test_what_is_not_served():
    x, weight = torch.randn(1, 5, 640), torch.randn(512, 640)
    assert not served(x, weight)  # gradients are wanted
    with torch.no_grad():
        assert served(x, weight)
        assert not served(x, weight.double())
        assert not served(x.to("meta"), weight)
        assert not served(x.int(), weight.int())


def test_compiled_models_are_left_alone():
    cpu, layer = torch.device("cpu"), torch.nn.Linear(4, 4)
    assert serves(layer, cpu)
    assert not serves(layer, torch.device("meta"))
    layer.compile()
    assert not serves(layer, cpu)
    other = torch.nn.Linear(4, 4)
    other.forward = torch.compile(other.forward)
    assert not serves(other, cpu)
