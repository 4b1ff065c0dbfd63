"""Cells: bounds, numbering, and what the router for them predicts and learns."""

import pytest
import torch

from saap.index import cells, fitting
from saap.index.cells import CellRouter
from saap.index.lists import invert

from .test_index import synthetic_masses


def test_ages_are_evenly_spaced_in_the_logarithm():
    ages = cells.segment_ages(8, 256, 8192)
    assert ages.tolist() == [395, 609, 939, 1448, 2233, 3444, 5312]
    assert cells.segment_ages(1, 256, 8192).tolist() == []
    with pytest.raises(ValueError, match="n_segments=0: accepted are 1 and more"):
        cells.segment_ages(0, 256, 8192)


def test_rows_of_a_bucket_stay_together_and_in_time_order():
    generator = torch.Generator().manual_seed(0)
    buckets = torch.randint(0, 5, (1, 2, 200), generator=generator)
    age = 16 + torch.arange(199, -1, -1)
    ages = torch.tensor([20, 50, 110], dtype=torch.int32)
    by_cell = invert(cells.cells_of(buckets, age, ages), 20)
    assert torch.equal(by_cell.order, invert(buckets, 5).order)
    assert torch.equal(by_cell.sizes.unflatten(-1, (5, 4)).sum(-1), invert(buckets, 5).sizes)
    assert cells.segments_of(torch.tensor([500, 110, 109, 50, 20, 19]), ages).tolist() == [
        0, 0, 1, 1, 2, 3,
    ]  # fmt: skip


def explicit_loss(router, q, cell_mass, outside, counts):
    """Cross-entropy with every cell written out, `[H, n]`."""
    predicted = router.mass(q.transpose(0, 1), counts).transpose(0, 1)
    rest = 1.0 - predicted.sum(-1)
    log = predicted.clamp(min=1e-30).log()
    return -(cell_mass * log).sum(-1) - outside * rest.log()


def test_the_loss_is_cross_entropy_over_cells():
    """`fit_cells` never writes the cells out; what it reports must be the same cross-entropy, but
    for the constant `sum y log n` of cell sizes."""
    n, nlist, n_segments, heads = 64, 6, 3, 4
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(heads, n, 8, generator=generator)
    counts = torch.randint(1, 9, (2, 1, nlist * n_segments), generator=generator).float()
    mass = torch.rand(heads, n, nlist * n_segments + 1, generator=generator).softmax(-1)
    cell_mass, outside = mass[..., :-1], mass[..., -1]
    grid = cell_mass.unflatten(-1, (nlist, n_segments))
    by_bucket = torch.cat([grid.sum(-1), outside[..., None]], -1)
    losses = []
    fitted = fitting.fit_cells(
        q, by_bucket, grid.sum(-2), counts, torch.zeros(n, dtype=torch.long),
        torch.tensor([20, 40], dtype=torch.int32), hidden=8, steps=1, batch=4096, lr=0.0,
        progress=lambda done, total, loss: losses.append(loss),
    )  # fmt: skip
    per_query = counts[:, [0] * n].transpose(0, 1)
    sizes = counts[:, 0].repeat_interleave(2, 0)[:, None]
    constant = (cell_mass * sizes.log()).sum(-1)
    expected = explicit_loss(fitted, q, cell_mass, outside, per_query) + constant
    # The batch is drawn with replacement: 4096 of 64 queries.
    assert losses[0] == pytest.approx(float(expected.mean()), rel=2e-3)


def test_a_cell_router_learns_age_and_content():
    n, nlist, n_segments = 1200, 12, 4
    q, mass = synthetic_masses(n=n, nlist=nlist)  # 3 heads
    q, mass = q[:2], mass[:2]
    prior = torch.tensor([0.02, 0.08, 0.2, 0.7])  # most of a bucket's mass is in its newest cell
    cell_mass = mass[..., :-1, None] * prior
    counts = torch.full((1, 1, nlist * n_segments), 5.0)
    fit, held = slice(0, 1000), slice(1000, None)
    router = fitting.fit_cells(
        q[:, fit], mass[:, fit].half(), cell_mass[:, fit].sum(-2).half(), counts,
        torch.zeros(1000, dtype=torch.long), torch.tensor([9, 19, 39], dtype=torch.int32),
        hidden=48, steps=300, batch=256,
    )  # fmt: skip
    sizes = counts[:, [0] * 200].transpose(0, 1)
    predicted = router.mass(q[:, held].transpose(0, 1), sizes).transpose(0, 1)
    truth = cell_mass[:, held].flatten(-2)
    best = predicted.topk(6, -1).indices
    share = truth.gather(-1, best).sum() / truth.topk(6, -1).values.sum()
    assert share > 0.9
    segments = predicted.unflatten(-1, (nlist, n_segments)).sum(-2)
    segments = segments / segments.sum(-1, keepdim=True)
    assert (segments.mean((0, 1)) - prior).abs().max() < 0.03


def test_prediction_follows_the_sizes_and_ignores_empty_cells():
    generator = torch.Generator().manual_seed(0)
    parameters = {
        "mean": torch.zeros(2, 4), "scale": torch.ones(2, 4),
        "w1": torch.randn(2, 5, 4, generator=generator), "b1": torch.zeros(2, 5),
        "w2": torch.randn(2, 3 + 1 + 2, 5, generator=generator), "b2": torch.zeros(2, 6),
        "ages": torch.tensor([10], dtype=torch.int32),
    }  # fmt: skip
    router = CellRouter(**parameters)
    q = torch.randn(1, 2, 4, generator=generator)
    sizes = torch.tensor([[[4, 0, 2, 1, 0, 3]]])
    mass = router.mass(q, sizes)
    assert (mass[..., [1, 4]] == 0).all()
    assert mass.isfinite().all()
    density, doubled = mass / sizes, router.mass(q, 2 * sizes) / (2 * sizes)
    kept = [0, 2, 3, 5]
    ratio = (density / doubled)[..., kept]
    assert torch.allclose(ratio, ratio[..., :1].expand_as(ratio), rtol=1e-5)
