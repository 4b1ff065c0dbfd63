"""Gradients that `saap.index.fitting` writes out are those of automatic differentiation."""

import pytest
import torch

from saap.index import fitting


@pytest.mark.parametrize("cached_floats", [1, 2**30])
@pytest.mark.parametrize("with_sizes", [True, False])
def test_gradients_of_the_cross_entropy(monkeypatch, cached_floats, with_sizes):
    monkeypatch.setattr(fitting, "CACHED_FLOATS", cached_floats)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(4, 30, 8, generator=generator)
    mass = torch.randn(4, 30, 12, generator=generator).softmax(-1) * 0.9  # need not sum to 1
    log_sizes = torch.rand(2, 3, 11, generator=generator).log() if with_sizes else None
    picked = torch.tensor([3, 3, 17, 29, 0])
    blocks = picked // 10 if with_sizes else None
    router = fitting.two_layers(q, torch.randn(4, 12, generator=generator), 6, seed=1)
    router.b1.normal_(generator=generator)
    trained = {name: getattr(router, name) for name in ("w1", "b1", "w2", "b2")}
    for parameter in trained.values():
        parameter.grad = torch.full_like(parameter, torch.nan)
    groups = fitting.head_groups(q, mass, log_sizes, 5)
    assert len(groups) == (1 if cached_floats > 1 else 2 if with_sizes else 4)
    losses = torch.cat([
        fitting.backward(router, trained, heads, q, mass, picked, log_sizes, blocks,
                         with_loss=True)
        for heads in groups
    ])  # fmt: skip
    ours = {name: parameter.grad for name, parameter in trained.items()}
    for parameter in trained.values():
        parameter.grad = None
        parameter.requires_grad_()
    logits = router.logits(q[:, picked].transpose(0, 1)).transpose(0, 1)
    if with_sizes:
        own = torch.nn.functional.pad(log_sizes[:, blocks].repeat_interleave(2, 0), (0, 1))
        logits = logits + own
    expected = -(mass[:, picked] * logits.log_softmax(-1)).sum(-1)
    expected.mean(1).sum().backward()
    assert (losses - expected).abs().max() < 1e-5
    for name, parameter in trained.items():
        assert (ours[name] - parameter.grad).abs().max() < 1e-6, name


@pytest.mark.parametrize("ridge", [-1.0, float("nan"), float("inf")])
def test_a_ridge_that_is_none(ridge):
    q, mass = torch.randn(1, 50, 4), torch.rand(1, 50, 3)
    with pytest.raises(ValueError, match=f"ridge must be a number of at least 0; got {ridge}"):
        fitting.fit_linear(q, mass, ridge=ridge)
