"""k-means, assignment and the fitting of routers."""

import pytest
import torch
from sklearn import cluster, linear_model

from saap.index import fitting, kmeans
from saap.index.routers import CentroidRouter


def blobs(n_blobs=8, per=60, dim=16, heads=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.nn.functional.normalize(
        torch.randn(heads, n_blobs, dim, generator=generator), dim=-1
    )
    noise = 0.05 * torch.randn(heads, n_blobs, per, dim, generator=generator)
    return centers, (centers[:, :, None] + noise).flatten(1, 2)


def test_kmeans_finds_blobs_and_is_seeded():
    _, points = blobs()
    first = kmeans.train_centroids(points, 8, seed=3)
    assert torch.equal(first, kmeans.train_centroids(points, 8, seed=3))
    assert torch.allclose(first.norm(dim=-1), torch.ones(2, 8), atol=1e-5)
    buckets = kmeans.assign(points, first)
    truth = torch.arange(8).repeat_interleave(60)
    purity = sum(
        int(torch.bincount(truth[buckets[h] == b], minlength=8).max())
        for h in range(2)
        for b in range(8)
    )
    assert purity / (2 * 480) >= 0.85  # measured: 0.94


def test_kmeans_in_torch_is_as_good_as_that_of_faiss():
    """By the mean product of points with their centroids; no bucket is empty."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(2, 20, 16, generator=generator)
    points = centers.repeat_interleave(60, 1) + 0.5 * torch.randn(2, 1200, 16, generator=generator)
    directions = torch.nn.functional.normalize(points, dim=-1)

    def quality(centroids):
        return (directions @ centroids.mT).amax(-1).mean()

    best = [
        max(quality(train(points, 32, seed=seed)) for seed in range(3))  # any one may be unlucky
        for train in (kmeans.lloyd, kmeans.train_centroids)
    ]
    assert best[0] > best[1] - 0.005
    own = kmeans.lloyd(points, 32, seed=1)
    assert torch.allclose(own.norm(dim=-1), torch.ones(2, 32), atol=1e-5)
    for head in kmeans.assign(points, own):
        assert len(head.unique()) == 32
    assert torch.equal(own, kmeans.lloyd(points, 32, seed=1))
    assert not torch.equal(own, kmeans.lloyd(points, 32, seed=2))


@pytest.mark.parametrize("n_distinct", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("nlist", [1, 4, 16])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_kmeans_of_few_distinct_keys(n_distinct, nlist, seed):
    """A prompt that repeats itself: each distinct key ends in a bucket, others stay empty."""
    distinct = torch.randn(2, n_distinct, 16, generator=torch.Generator().manual_seed(seed))
    points = distinct.repeat(1, 80, 1)
    centroids = kmeans.lloyd(points, nlist, seed=seed)
    assert centroids.isfinite().all()
    assert torch.allclose(centroids.norm(dim=-1), torch.ones(2, nlist), atol=1e-5)
    buckets = kmeans.assign(points, centroids)
    assert len(buckets[0].unique()) <= min(nlist, n_distinct)
    assert torch.equal(buckets[:, :n_distinct], buckets[:, -n_distinct:])
    assert kmeans.mean_products(points, centroids).isfinite().all()


def test_kmeans_is_as_good_as_that_of_scikit_learn():
    """By inertia of the directions, on blobs easy to tell apart; the best of 20 starts."""
    _, points = blobs(n_blobs=3)
    for head in torch.nn.functional.normalize(points, dim=-1):
        theirs = cluster.KMeans(3, n_init=20, random_state=0).fit(head.numpy()).inertia_
        for train in (kmeans.lloyd, kmeans.train_centroids):
            found = [train(head[None], 3, seed=seed)[0] for seed in range(20)]
            ours = min(float(torch.cdist(head, c).amin(-1).square().sum()) for c in found)
            assert ours < 1.02 * theirs, train.__name__


def test_the_linear_router_is_ridge_regression():
    q, mass = synthetic_masses()
    ours = fitting.fit_linear(q, mass, ridge=1e-2)
    for head in range(len(q)):
        x, y = q[head].numpy(), mass[head, :, :-1].numpy()
        alpha = 1e-2 * float((x.astype("float64") ** 2).sum(0).mean())
        theirs = linear_model.Ridge(alpha=alpha).fit(x, y)
        assert torch.allclose(ours.weight[head], torch.tensor(theirs.coef_), atol=1e-5)
        assert torch.allclose(ours.bias[head], torch.tensor(theirs.intercept_), atol=1e-5)


def test_assignment_ignores_length_and_chunks():
    _, points = blobs()
    centroids = kmeans.train_centroids(points, 8)
    whole = kmeans.assign(points, centroids)
    assert torch.equal(whole, kmeans.assign(points * 7.0, centroids))
    assert torch.equal(whole, kmeans.assign(points, centroids, chunk=37))


@pytest.mark.parametrize("nlist", [0, 481])
def test_too_few_points(nlist):
    with pytest.raises(ValueError, match=rf"nlist must be in 1\.\.480, .*; got {nlist}"):
        kmeans.train_centroids(blobs()[1], nlist)


def test_nan_points_are_refused():
    points = blobs()[1]
    points[0, 3, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN or inf"):
        kmeans.train_centroids(points, 4)


def synthetic_masses(n=1200, dim=16, nlist=12, heads=3, seed=0):
    """Bucket mass that is a known function of the query, not of any centroid."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(heads, n, dim, generator=generator)
    teacher = torch.randn(heads, nlist + 1, dim, generator=generator)
    return q, (2.0 * q @ teacher.mT / dim**0.5).softmax(-1)


def recall_at(router, q, mass, nprobe=2):
    best = router.mass(q.transpose(0, 1)).transpose(0, 1).topk(nprobe, -1).indices
    return (mass[..., :-1].gather(-1, best).sum() / mass[..., :-1].sum()).item()


def test_learned_routers_beat_chance_and_the_mlp_beats_linear():
    q, mass = synthetic_masses()
    fit, held = slice(0, 1000), slice(1000, None)
    linear = fitting.fit_linear(q[:, fit], mass[:, fit])
    mlp = fitting.fit_mlp(q[:, fit], mass[:, fit].half(), hidden=48, steps=300, batch=256)
    best = mass[:, held, :-1].topk(2, -1).values.sum() / mass[:, held, :-1].sum()
    found = {r: recall_at(router, q[:, held], mass[:, held]) / best.item()
             for r, router in (("linear", linear), ("mlp", mlp))}  # fmt: skip
    assert found["linear"] >= 0.85  # measured: 0.93
    assert found["mlp"] >= 0.92  # measured: 0.97
    assert found["mlp"] > found["linear"]


def test_fits_are_seeded_and_predict_probabilities():
    q, mass = synthetic_masses(n=300)
    a, b = (fitting.fit_mlp(q, mass, hidden=8, steps=20, batch=64, seed=5) for _ in range(2))
    for name, tensor in a.tensors().items():
        assert torch.equal(tensor, b.tensors()[name]), name
    predicted = a.mass(q.transpose(0, 1))
    assert (predicted >= 0).all()
    assert (predicted.sum(-1) <= 1 + 1e-5).all()


def test_non_finite_loss_stops():
    q, mass = synthetic_masses(n=200)
    q[0, :] = torch.inf
    with pytest.raises(FloatingPointError, match="router loss must be finite; got nan"):
        fitting.fit_mlp(q, mass, steps=2, progress=lambda *_: None)


def test_router_bytes_are_counted():
    router = CentroidRouter(torch.zeros(2, 8, 16))
    assert router.nbytes == 2 * 8 * 16 * 4
