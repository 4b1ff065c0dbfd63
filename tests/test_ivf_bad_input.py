"""Bad input to the index: the error names the value, and the index is as it was."""

import pytest
import torch

from saap.index.ivf import AsymmetricIVF
from saap.index.routers import CentroidRouter, LinearRouter

pytestmark = pytest.mark.bad_input

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
    (with_value(torch.nan), "xb must be finite; got NaN or inf"),
    (with_value(-torch.inf), "xb must be finite"),
    (random(N_KV, 5, DIM + 1), r"xb must be \[2, n, 16\] .*; got \(2, 5, 17\)"),
    (random(1, 5, DIM), r"xb must be \[2, n, 16\] .*; got \(1, 5, 16\)"),
    (random(N_KV, 0, DIM), r"xb must be .* with n of at least 1; got \(2, 0, 16\)"),
    (random(5, DIM), r"xb must be .*; got \(5, 16\)"),
    (random(N_KV, 5, DIM).double(), "xb must have dtype torch.float32; got torch.float64"),
    (
        torch.ones(N_KV, 5, DIM, dtype=torch.int32),
        "xb must have dtype torch.float32; got torch.int32",
    ),
    (random(N_KV, 5, DIM).half(), "xb must have dtype torch.float32; got torch.float16"),
]
BAD_POSITIONS = [
    (torch.tensor([200, 201, 202, 203, 200]), "positions must occur once each; got 200 twice"),
    (torch.tensor([200, 201, 3, 203, 204]), "got 3 twice"),
    (torch.tensor([200, 201, 105, 203, 204]), "got 105 twice"),  # a pending one
    (torch.arange(4) + 200, r"positions must be integers \[5\]; got shape \(4,\) and"),
    (torch.rand(5), "positions must be integers .* and dtype torch.float32"),
    (torch.arange(5) - 1, "positions must be at least 0; got -1"),
    (torch.arange(5) + 2**62, r"positions must be at most 2\*\*62; got 4611686018427387908"),
]
BAD_CALLS = [
    (
        lambda i: i.select(random(1, N_HEADS, DIM), max_tokens=float("nan")),
        "must be a whole .* nan",
    ),
    (
        lambda i: i.select(random(1, N_HEADS, DIM), nprobe=2.5),
        "nprobe must be a whole number; got 2.5",
    ),
    (lambda i: i.select(random(1, N_HEADS, DIM), nprobe=True), "nprobe must be .*; got True"),
    (lambda i: i.select(random(1, N_HEADS, DIM), top_p="1"), "top_p must be above 0 .*; got '1'"),
    (lambda i: i.search(random(DIM), 1, 1), r"xq must be \[n, a multiple of 2, 16\]; got \(16,\)"),
    *[(lambda i, xb=xb: i.add(xb), message) for xb, message in BAD_KEYS],
    *[(lambda i, p=p: i.add(random(N_KV, 5, DIM), p), message) for p, message in BAD_POSITIONS],
    (
        lambda i: i.add(random(N_KV, 5, DIM), route_by=random(N_KV, 4, DIM)),
        r"route_by must have the shape of xb, \(2, 5, 16\); got \(2, 4, 16\)",
    ),
    (
        lambda i: i.add(random(N_KV, 5, DIM), route_by=with_value(torch.nan)),
        "route_by must be finite; got NaN or inf",
    ),
    (
        lambda i: i.train(random(N_KV, 99, DIM)),
        "train must come before keys are added; got ntotal=110",
    ),
    (
        lambda i: i.refine(random(N_KV, 99, DIM)),
        "refine must come before keys are added; got ntotal=110",
    ),
    (
        lambda i: i.add(random(N_KV, 5, DIM), route_by=torch.ones(N_KV, 5, DIM, dtype=torch.int8)),
        "route_by must have dtype torch.float32 .*; got torch.int8",
    ),
    (
        lambda i: i.remove(torch.tensor([1.0])),
        r"positions must be integers \[m\]; got shape \(1,\) and dtype torch.float32",
    ),
    (lambda i: i.remove(torch.tensor(3)), r"positions must be integers \[m\]; got shape \(\)"),
    (lambda i: i.truncate(-1), "length must be an integer of at least 0; got -1"),
    (lambda i: i.route(random(3, 5, DIM)), r"xq must be \[n, a multiple of 2, 16\]; got \(3, 5"),
    (lambda i: i.route(random(3, 4, 9)), r"xq must be .*; got \(3, 4, 9\)"),
    (lambda i: i.route(random(4, DIM)), r"xq must be .*; got \(4, 16\)"),
    (lambda i: i.route(with_value(torch.nan)[:, :4]), "xq must be finite"),
    (
        lambda i: i.select(random(1, 4, DIM)),
        "one of nprobe, max_tokens and top_p must be set; got none",
    ),
    (lambda i: i.select(random(1, 4, DIM), nprobe=9), r"nprobe must be in 1\.\.8; got 9"),
    (
        lambda i: i.select(random(1, 4, DIM), max_tokens=-1),
        "max_tokens must be at least 0; got -1",
    ),
    (
        lambda i: i.select(random(1, 4, DIM), nprobe=1, share="all"),
        "share must be 'group' or 'head'; got 'all'",
    ),
    (
        lambda i: i.select(random(1, 4, DIM), top_p=0.5),
        "top_p must be None with a centroid router, .*; got 0.5",
    ),
    (
        lambda i: i.select(random(1, 4, DIM), top_p=1.5),
        "top_p must be above 0 and at most 1; got 1.5",
    ),
    (lambda i: i.search(random(1, 4, DIM), 0, 2), "k must be an integer of at least 1; got 0"),
    (lambda i: i.search(random(1, 4, DIM), 5, 0), r"nprobe must be in 1\.\.8; got 0"),
    (
        lambda i: i.search(random(1, 4, DIM), 5, 2, route_by=random(2, 4, DIM)),
        r"route_by must have the shape of xq, .*; got \(2, 4, 16\)",
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
        (
            random(N_KV, 7, DIM),
            {},
            r"nlist must be in 1\.\.7, the number of points per head; got 8",
        ),
        (zero_vector(), {}, "points must be non-zero; got 1 zero vectors"),
        (with_value(torch.nan), {}, "xt must be finite"),
        (random(N_KV, 50, DIM + 1), {}, r"xt must be .*; got \(2, 50, 17\)"),
        (random(N_KV, 50, DIM).double(), {}, "xt must have dtype .*; got torch.float64"),
        (
            random(N_KV, 50, DIM),
            {"router": "mlp"},
            "router must be centroid without training queries; got 'mlp'",
        ),
        (
            random(N_KV, 50, DIM),
            {"router": "tree"},
            "router must be one of mlp, linear, centroid; got 'tree'",
        ),
        (
            random(N_KV, 50, DIM),
            {"xq_train": random(N_HEADS, 9, DIM), "xq_score": random(N_HEADS, 8, DIM)},
            r"xq_score must have the shape of xq_train, .*; got \(4, 8, 16\)",
        ),
        (
            random(N_KV, 50, DIM),
            {
                "xq_train": random(N_HEADS, 9, DIM),
                "xt_score": random(N_KV, 50, DIM) * torch.inf,
            },
            "xt_score must be finite",
        ),
        (
            random(N_KV, 50, DIM),
            {"xq_train": random(3, 9, DIM)},
            r"xq_train must be \[n, a multiple of 2, 16\]; got \(9, 3, 16\)",
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
        (
            lambda i: i.add(random(N_KV, 5, DIM)),
            "add must come after training; got an untrained index: call tr",
        ),
        (lambda i: i.search(random(1, 4, DIM), 5, 2), "route must come after training"),
        (lambda i: i.select(random(1, 4, DIM), nprobe=2), "route must come after training"),
        (lambda i: i.refine(random(N_KV, 50, DIM)), "refine must come after training"),
    ],
)
def test_use_before_training(call, message):
    with pytest.raises(ValueError, match=message):
        call(AsymmetricIVF(DIM, N_KV, NLIST))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d": 0}, "d must be an integer of at least 1; got 0"),
        ({"nlist": 2.5}, r"nlist must be an integer of at least 1; got 2\.5"),
        ({"flush_every": 0}, "flush_every must be .*; got 0"),
        ({"dtype": torch.float64}, "dtype must be torch.float32 or .*; got torch.float64"),
        ({"nlist": 1, "spill": True}, "nlist must be at least 2 with spill; got 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        AsymmetricIVF(**{"d": DIM, "n_kv": N_KV, "nlist": NLIST, **options})


def test_bad_trained_parts():
    centroids = random(N_KV, NLIST, DIM)
    with pytest.raises(ValueError, match=r"centroids must be \[Hkv, nlist, D\]; got \(8, 16\)"):
        AsymmetricIVF.from_trained(centroids[0])
    with pytest.raises(ValueError, match="nlist of the router must be 8; got 7"):
        AsymmetricIVF.from_trained(centroids, CentroidRouter(centroids[:, :7]))
    router = LinearRouter(random(N_HEADS, NLIST, DIM), random(N_HEADS, NLIST))
    index = AsymmetricIVF.from_trained(centroids, router)
    with pytest.raises(ValueError, match=r"xq must be \[n, 4, 16\]; got \(1, 2, 16\)"):
        index.route(random(1, 2, DIM))
    with pytest.raises(ValueError, match="centroids must be finite"):
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

    with pytest.raises(ValueError, match="k must be at most 2048 for FAISS on a GPU; got 2049"):
        check_gpu_limits(torch.device("cuda"), k=2049)
    check_gpu_limits(torch.device("cpu"), k=10**6)


def test_what_could_not_be_opened_again_is_not_made():
    with pytest.raises(ValueError, match="nlist must be at most 65536; got 65537"):
        AsymmetricIVF.from_trained(torch.zeros(1, 65537, 2))
    with pytest.raises(ValueError, match="flush_every must be at most 1099511627776; got"):
        AsymmetricIVF(DIM, 1, 4, flush_every=2**63 - 1)


@pytest.mark.parametrize(
    ("queries", "options", "message"),
    [
        (1, {}, "xq_train must hold at least 2 queries to fit a router; got 1"),
        (20, {"hidden": 0}, "hidden must be an integer of at least 1; got 0"),
        (20, {"steps": 0}, "steps must be an integer of at least 1; got 0"),
    ],
)
def test_routers_that_nothing_is_learned_by(queries, options, message):
    index = AsymmetricIVF(DIM, N_KV, NLIST)
    with pytest.raises(ValueError, match=message):
        index.train(random(N_KV, 200, DIM), random(N_HEADS, queries, DIM), **options)
    assert not index.is_trained
