"""Bad input to the index: the error names the value, and the index is as it was."""

import pytest
import torch

from saap.index.ivf import AsymmetricIVF
from saap.index.routers import CentroidRouter, LinearRouter

N_KV, N_HEADS, DIM, NLIST = 2, 4, 16, 8


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def index():
    index = AsymmetricIVF(DIM, N_KV, NLIST, flush_every=64)
    index.train(random(N_KV, 200, DIM))
    index.add(random(N_KV, 100, DIM, seed=1))
    index.add(random(N_KV, 10, DIM, seed=2))
    return index


def with_value(value):
    xb = random(N_KV, 5, DIM)
    xb[1, 3, 2] = value
    return xb


BAD_KEYS = [
    (with_value(torch.nan), "xb holds NaN or inf: accepted are finite vectors"),
    (with_value(-torch.inf), "xb holds NaN or inf"),
    (random(N_KV, 5, DIM + 1), r"xb has shape \(2, 5, 17\): accepted is \[2, n, 16\]"),
    (random(1, 5, DIM), r"xb has shape \(1, 5, 16\): accepted is \[2, n, 16\]"),
    (random(N_KV, 0, DIM), r"xb has shape \(2, 0, 16\): .* with n from 1"),
    (random(5, DIM), r"xb has shape \(5, 16\)"),
    (random(N_KV, 5, DIM).double(), "xb has dtype torch.float64: accepted is torch.float32"),
    (torch.ones(N_KV, 5, DIM, dtype=torch.int32), "xb has dtype torch.int32"),
    (random(N_KV, 5, DIM).half(), "xb has dtype torch.float16: accepted is torch.float32"),
]
BAD_POSITIONS = [
    (torch.tensor([200, 201, 202, 203, 200]), "position 200 occurs twice: accepted is each once"),
    (torch.tensor([200, 201, 3, 203, 204]), "position 3 occurs twice"),
    (torch.tensor([200, 201, 105, 203, 204]), "position 105 occurs twice"),  # a pending one
    (torch.arange(4) + 200, r"positions has shape \(4,\).*: accepted is \[5\] of integers"),
    (torch.rand(5), "dtype torch.float32: accepted is .* of integers"),
    (torch.arange(5) - 1, "position -1: accepted are 0 and more"),
]
BAD_CALLS = [
    *[(lambda i, xb=xb: i.add(xb), message) for xb, message in BAD_KEYS],
    *[(lambda i, p=p: i.add(random(N_KV, 5, DIM), p), message) for p, message in BAD_POSITIONS],
    (
        lambda i: i.add(random(N_KV, 5, DIM), route_by=random(N_KV, 4, DIM)),
        r"route_by has shape \(2, 4, 16\): accepted is that of xb, \(2, 5, 16\)",
    ),
    (
        lambda i: i.add(random(N_KV, 5, DIM), route_by=with_value(torch.nan)),
        "route_by holds NaN or inf",
    ),
    (lambda i: i.train(random(N_KV, 99, DIM)), "ntotal=110: an index is trained before"),
    (lambda i: i.refine(random(N_KV, 99, DIM)), "ntotal=110: centroids are refined before"),
    (
        lambda i: i.add(random(N_KV, 5, DIM), route_by=torch.ones(N_KV, 5, DIM, dtype=torch.int8)),
        "route_by has dtype torch.int8: accepted is torch.float32",
    ),
    (
        lambda i: i.remove(torch.tensor([1.0])),
        r"positions has shape \(1,\) and dtype torch.float32",
    ),
    (lambda i: i.remove(torch.tensor(3)), r"positions has shape \(\)"),
    (lambda i: i.truncate(-1), "length=-1: accepted are integers from 0"),
    (lambda i: i.route(random(3, 5, DIM)), r"xq has shape \(3, 5, 16\): accepted is \[n, a mult"),
    (lambda i: i.route(random(3, 4, 9)), r"xq has shape \(3, 4, 9\)"),
    (lambda i: i.route(random(4, DIM)), r"xq has shape \(4, 16\)"),
    (lambda i: i.route(with_value(torch.nan)[:, :4]), "xq holds NaN or inf"),
    (lambda i: i.select(random(1, 4, DIM)), "nprobe, max_tokens and top_p are all None"),
    (lambda i: i.select(random(1, 4, DIM), nprobe=9), "nprobe=9: accepted are 1 to nlist=8"),
    (lambda i: i.select(random(1, 4, DIM), max_tokens=-1), "max_tokens=-1: accepted are 0"),
    (lambda i: i.select(random(1, 4, DIM), nprobe=1, share="all"), "share='all': accepted are"),
    (
        lambda i: i.select(random(1, 4, DIM), top_p=0.5),
        "top_p=0.5: accepted with a router that predicts mass",
    ),
    (lambda i: i.select(random(1, 4, DIM), top_p=1.5), "top_p=1.5: accepted are 0 < top_p <= 1"),
    (lambda i: i.search(random(1, 4, DIM), 0, 2), "k=0: accepted are integers from 1"),
    (lambda i: i.search(random(1, 4, DIM), 5, 0), "nprobe=0: accepted are 1 to nlist=8"),
    (
        lambda i: i.search(random(1, 4, DIM), 5, 2, route_by=random(2, 4, DIM)),
        r"route_by has shape \(2, 4, 16\): accepted is that of xq",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD_CALLS)
def test_bad_calls_leave_the_index_as_it_was(index, call, message):
    q = random(2, N_HEADS, DIM, seed=4)
    before = (*index.search(q, 9, 3), *index.select(q, nprobe=3), index.positions.clone())
    with pytest.raises(ValueError, match=message):
        call(index)
    after = (*index.search(q, 9, 3), *index.select(q, nprobe=3), index.positions)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)
    index.add(random(N_KV, 60, DIM, seed=5))  # merges
    assert (index.ntotal, index.n_pending) == (170, 0)


def zero_vector():
    xt = random(N_KV, 50, DIM)
    xt[1, 7] = 0
    return xt


@pytest.mark.parametrize(
    ("xt", "options", "message"),
    [
        (random(N_KV, 7, DIM), {}, "nlist=8 with 7 points a head: accepted are 1 to that number"),
        (zero_vector(), {}, "points holds 1 zero vectors, which have no direction"),
        (with_value(torch.nan), {}, "xt holds NaN or inf"),
        (random(N_KV, 50, DIM + 1), {}, r"xt has shape \(2, 50, 17\)"),
        (random(N_KV, 50, DIM).double(), {}, "xt has dtype torch.float64"),
        (random(N_KV, 50, DIM), {"router": "mlp"}, "router='mlp': "),
        (random(N_KV, 50, DIM), {"router": "tree"}, "router='tree': accepted are mlp, linear"),
        (
            random(N_KV, 50, DIM),
            {"xq_train": random(N_HEADS, 9, DIM), "xq_score": random(N_HEADS, 8, DIM)},
            r"xq_score has shape \(4, 8, 16\): accepted is that of xq_train",
        ),
        (
            random(N_KV, 50, DIM),
            {
                "xq_train": random(N_HEADS, 9, DIM),
                "xt_score": random(N_KV, 50, DIM) * torch.inf,
            },
            "xt_score holds NaN or inf",
        ),
        (
            random(N_KV, 50, DIM),
            {"xq_train": random(3, 9, DIM)},
            r"xq_train has shape \(9, 3, 16\): accepted is \[n, a multiple of 2, 16\]",
        ),
    ],
)
def test_bad_training_leaves_the_index_untrained(xt, options, message):
    index = AsymmetricIVF(DIM, N_KV, NLIST)
    with pytest.raises(ValueError, match=message):
        index.train(xt, **options)
    assert not index.is_trained
    index.train(random(N_KV, 50, DIM))
    assert index.is_trained


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda i: i.add(random(N_KV, 5, DIM)), "add before training: call train, or use from_tr"),
        (lambda i: i.search(random(1, 4, DIM), 5, 2), "route before training"),
        (lambda i: i.select(random(1, 4, DIM), nprobe=2), "route before training"),
        (lambda i: i.refine(random(N_KV, 50, DIM)), "refine before training"),
    ],
)
def test_use_before_training(call, message):
    with pytest.raises(ValueError, match=message):
        call(AsymmetricIVF(DIM, N_KV, NLIST))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d": 0}, "d=0: accepted are integers from 1"),
        ({"nlist": 2.5}, r"nlist=2\.5: accepted are integers from 1"),
        ({"flush_every": 0}, "flush_every=0"),
        ({"dtype": torch.float64}, "dtype=torch.float64: accepted are torch.float32"),
        ({"nlist": 1, "spill": True}, "nlist=1: accepted with spill are 2 and more"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        AsymmetricIVF(**{"d": DIM, "n_kv": N_KV, "nlist": NLIST, **options})


def test_bad_trained_parts():
    centroids = random(N_KV, NLIST, DIM)
    with pytest.raises(ValueError, match=r"centroids has shape \(8, 16\)"):
        AsymmetricIVF.from_trained(centroids[0])
    with pytest.raises(ValueError, match="router has nlist=7: accepted is 8"):
        AsymmetricIVF.from_trained(centroids, CentroidRouter(centroids[:, :7]))
    router = LinearRouter(random(N_HEADS, NLIST, DIM), random(N_HEADS, NLIST))
    index = AsymmetricIVF.from_trained(centroids, router)
    with pytest.raises(ValueError, match=r"xq has shape \(1, 2, 16\): accepted is \[n, 4, 16\]"):
        index.route(random(1, 2, DIM))
    with pytest.raises(ValueError, match="centroids holds NaN or inf"):
        AsymmetricIVF.from_trained(centroids * torch.nan)


def test_empty_buckets_and_a_head_with_one_bucket_are_fine():
    """All keys of head 0 fall into one bucket; the others are empty and never chosen."""
    index = AsymmetricIVF(DIM, N_KV, NLIST, flush_every=1)
    index.train(random(N_KV, 200, DIM))
    xb = random(N_KV, 30, DIM, seed=1)
    xb[0] = index.centroids[0, 3] * torch.linspace(1, 2, 30)[:, None]
    index.add(xb)
    assert index.statistics().n_empty[0] == NLIST - 1
    q = random(3, N_HEADS, DIM)
    _, lengths = index.select(q, nprobe=1)
    assert (lengths[:, 0].sum(-1) == 30).all()
    assert (index.search(q, 5, 1)[1][:, :2] >= 0).all()


def test_zero_keys_are_held():
    """A key of zeros has a score, 0, and so a place in attention; only training refuses it."""
    index = AsymmetricIVF(DIM, N_KV, NLIST, flush_every=1)
    index.train(random(N_KV, 200, DIM))
    index.add(torch.zeros(N_KV, 2, DIM))
    assert index.select(random(1, N_HEADS, DIM), nprobe=NLIST)[1].sum() == 2 * N_KV


def test_gpu_limits_are_named():
    from saap.index.faiss_backend import check_gpu_limits

    with pytest.raises(ValueError, match="k=2049: accepted by FAISS on a GPU are at most 2048"):
        check_gpu_limits(torch.device("cuda"), k=2049)
    check_gpu_limits(torch.device("cpu"), k=10**6)
