"""The estimate of the rest: implementations agree, and what they say of normal rows is true."""

import copy
import dataclasses
import math
import os

import pytest
import torch

from saap.kernels.rest import Moments, PreparedRest, Scored, add_rest
from saap.kernels.rest.reference import below, quantile

SCALE = 0.3
CAN_TRITON = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
NO_TRITON = pytest.mark.skipif(not CAN_TRITON, reason="test_triton_interpreter runs it")
IMPLS = ["numba", pytest.param("triton", marks=NO_TRITON)]


@dataclasses.dataclass
class Case:
    out: torch.Tensor
    lse: torch.Tensor
    q: torch.Tensor
    moments: Moments
    lengths: torch.Tensor
    bounds: dict = dataclasses.field(default_factory=dict)
    scored: Scored | None = None

    def run(self, impl, dtype=None, **changed):
        own = dataclasses.replace(self, **changed)
        out, q = (t if dtype is None else t.to(dtype) for t in (own.out, own.q))
        device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
        out, lse, q, lengths = (t.to(device, copy=True) for t in (out, own.lse, q, own.lengths))
        moments = Moments(*(t.to(device) for t in vars(own.moments).values()))
        if len(moments.means) == 1 < len(q):
            moments = moments.expand(len(q))
        scored = own.scored
        if scored is not None:
            parts = (t.to(device) for t in (scored.lse, scored.mean, scored.n_scored))
            scored = Scored(*parts, scored.n_best, scored.one_of)
        found = add_rest(
            out, lse, q, moments, lengths, sm_scale=SCALE, impl=impl, scored=scored, **own.bounds
        )
        return tuple(t.cpu() for t in found)


def moments_of(k, v, clusters=5):
    """Of keys and values `[B, Hkv, n, D]`, clusters being parts of different length."""
    batch, n_kv, n, dim = k.shape
    rows = torch.cat([k, v], -1).double()
    mean = rows.mean(2, keepdim=True)
    off = rows - mean
    number = (torch.arange(n) / n).sqrt().mul(clusters).long().clamp(max=clusters - 1)
    one = torch.nn.functional.one_hot(number, clusters).double()
    count = one.sum(0)
    parts = (one.mT @ off) / count.clamp(min=1)[:, None]  # [B, Hkv, K, 2 D]
    within = off - parts[:, :, number]
    spread = within[..., :dim].mT @ within / n
    own = (one.mT @ within[..., :dim].square().sum(-1, keepdim=True))[..., 0]
    own = own / count.clamp(min=1) / (own.sum(-1, keepdim=True) / n)
    share = (count / n).expand(batch, n_kv, -1)
    return Moments(
        spread.bfloat16(), mean[:, :, 0].float(),
        parts[..., :dim].mT.contiguous().bfloat16(), parts[..., dim:].contiguous().bfloat16(),
        torch.stack([share, own], 2).float(), torch.full((batch,), n, dtype=torch.int32),
    )  # fmt: skip


def case(batch=2, n_kv=2, group=3, dim=16, n=500, heads=None, seed=0, clusters=5):
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=rng)

    size = (16 / dim) ** 0.5  # scores are as far apart whatever the dimensions
    k = draw(batch, n_kv, n, dim) @ draw(dim, dim) * 0.3 * size + draw(dim) * size
    k = (
        k * torch.linspace(0.5, 1.5, n)[:, None]
        + draw(n // 50, dim).repeat_interleave(50, 0) * size
    )
    v = draw(batch, n_kv, n, dim) + k @ draw(dim, dim) * 0.2
    lengths = torch.randint(0, 3, (batch, heads or n_kv, 40), generator=rng, dtype=torch.int32)
    q = draw(batch, n_kv * group, dim)
    lse = draw(batch, n_kv * group) + math.log(n)
    return Case(draw(*q.shape), lse, q, moments_of(k, v, clusters), lengths)


def close(found, expected, atol=2e-5):
    """Sums of D products in float32, and exponentials of their result."""
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=2e-4, atol=atol)


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
@pytest.mark.parametrize("dim", [1, 8, 64, 80])
@pytest.mark.parametrize(("heads", "clusters"), [(None, 5), (6, 1), (None, 32)])
def test_implementations_agree(impl, dim, heads, clusters):
    own = case(dim=dim, heads=heads, clusters=clusters)
    exact = own.run("reference", torch.float64)
    close(own.run(impl), exact)
    assert not torch.allclose(exact[0], own.out.double())  # something was added


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_a_sequence_is_the_same_alone(impl):
    own = case(batch=3)
    out, lse = own.run(impl)
    for b in range(3):
        moments = Moments(*(t[b : b + 1] for t in vars(own.moments).values()))
        parts = {n: getattr(own, n)[b : b + 1] for n in ("out", "lse", "q", "lengths")}
        alone = Case(moments=moments, **parts).run(impl)
        torch.testing.assert_close(alone[0][0], out[b], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(alone[1][0], lse[b], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_many_queries_of_one_sequence(impl):
    own = case(batch=1)
    many = Case(
        *(t.expand(5, *t.shape[1:]).contiguous() for t in (own.out, own.lse, own.q)),
        own.moments,
        own.lengths.expand(5, -1, -1).contiguous(),
    )
    close([t[3:4] for t in many.run(impl)], own.run(impl))


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_what_is_left_alone(impl):
    own = case(batch=4)
    lengths, q = own.lengths.clone(), own.q.clone()
    n_rows = own.moments.n_rows.clone()
    lengths[0] = 0
    lengths[0, :, 0] = n_rows[0]  # visited whole
    n_rows[1] = 0  # nothing to choose from
    q[2, 1, 3] = torch.nan
    q[2, 2, 3] = torch.inf
    moments = dataclasses.replace(own.moments, n_rows=n_rows)
    out, lse = own.run(impl, lengths=lengths, q=q, moments=moments)
    for place in [0, 1, (2, 1), (2, 2)]:
        assert torch.equal(out[place], own.out[place])
        assert torch.equal(lse[place], own.lse[place])
    assert not torch.equal(out[2, 0], own.out[2, 0])
    assert not torch.equal(out[3], own.out[3])


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_where_nothing_was_visited(impl):
    """All is estimated then; and of nothing else, whatever `out` holds."""
    own = case()
    out, lse = own.run(
        impl, lse=torch.full_like(own.lse, -torch.inf), out=torch.full_like(own.out, torch.nan)
    )
    assert out.isfinite().all()
    assert lse.isfinite().all()


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
@pytest.mark.parametrize("size", [0.0, 1e-4, 30.0, 1e3])
def test_flat_and_peaked_queries(impl, size):
    """Scores that are all alike, and such that are far apart."""
    own = case()
    exact = own.run("reference", torch.float64, q=own.q.double() * size)
    found = own.run(impl, q=own.q * size)
    torch.testing.assert_close(found[1].double(), exact[1].double(), rtol=1e-3, atol=1e-3)
    assert found[0].isfinite().all()


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
@pytest.mark.parametrize("heads", [None, 6])
@pytest.mark.parametrize("max_tokens", [5, 50, None])
def test_bounds_of_what_is_left_out(impl, heads, max_tokens):
    """Where scores are far apart, what a row that is left out may weigh says more than how many
    there are."""
    own = case(heads=heads)
    own.bounds = {"min_weight": 1e-3, "max_tokens": max_tokens}
    q = own.q * 5
    exact = own.run("reference", torch.float64, q=q.double())
    close(own.run(impl, q=q), exact, atol=5e-4)  # variances of a hundred, in float32
    free = dataclasses.replace(own, bounds={}).run("reference", torch.float64, q=q.double())
    assert (free[1] >= exact[1] - 1e-3).all()
    if max_tokens != 5:
        assert (free[1] > exact[1] + 1e-3).any()


def scored_of(own, maps=2, heads=2, n_scored=300, n_best=150, one_of=None):
    """Of some rows, by chance."""
    rng = torch.Generator().manual_seed(7)
    batch, n_heads, dim = own.q.shape
    lse = own.lse - torch.rand(batch, n_heads, generator=rng) * 3
    lse[0, 0] = -torch.inf
    mean = torch.randn(maps, n_heads // 3, dim, generator=rng)
    return Scored(lse, mean, torch.full((batch, heads), n_scored), n_best, one_of)


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
@pytest.mark.parametrize(
    ("maps", "heads", "n_scored", "n_best", "one_of"),
    [
        (2, 2, 300, 150, None), (1, 6, 300, 10, 3), (2, 2, 300, 400, 8), (1, 2, 500, 500, None),
        (2, 6, 800, 2**40, 1), (2, 2, 0, 100, 8),
    ],
)  # fmt: skip
def test_implementations_agree_on_rows_that_were_scored(
    impl, maps, heads, n_scored, n_best, one_of
):
    own = case()
    own.scored = scored_of(own, maps, heads, n_scored, n_best, one_of)
    exact = own.run("reference", torch.float64)
    close(own.run(impl), exact)
    without = own.run("reference", torch.float64, scored=None)
    assert not torch.allclose(exact[1], without[1])


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
@pytest.mark.parametrize("n_best", [200, 800, 4000])
def test_rows_that_were_scored_are_counted_as_they_are(impl, n_best):
    """Keys are normal here. Heads choose together, so that what one of them leaves out are not its
    lowest scores alone: without scores the rest is thought to weigh less."""
    own = case(batch=1, n_kv=1)
    rng = torch.Generator().manual_seed(3)
    n, chosen, dim = 4000, 200, own.q.shape[2]
    k = torch.randn(1, 1, n, dim, generator=rng)
    own.moments, mean = moments_of(k, torch.randn(k.shape, generator=rng)), 0.1 * k[:, :, 0]
    own.q = own.q * torch.tensor([1.0, 1.5, 2.0])[:, None]
    scores = SCALE * (own.q @ k[0, 0].mT)[0]
    order = scores.argsort(1, descending=True)
    visited = torch.zeros(3, n, dtype=torch.bool)
    visited[:, scores.softmax(1).sum(0).topk(chosen).indices] = True
    own.lengths = torch.full((1, 1, 1), chosen, dtype=torch.int32)
    own.lse = scores.masked_fill(~visited, -torch.inf).logsumexp(1)[None]
    seen = torch.zeros(3, n, dtype=torch.bool)
    seen[:, order[:, :n_best].unique()] = True
    left = scores.masked_fill(visited | ~seen, -torch.inf).logsumexp(1)
    shared = SCALE * (own.q @ mean[0, 0])[0]
    own.scored = Scored((left - shared)[None], mean, seen[0].sum().view(1, 1), n_best)
    true = scores.logsumexp(1)
    error = (own.run(impl)[1][0] - true).abs()
    assert (error < (1e-4 if n_best == n else 0.05)).all()
    assert (own.run(impl, scored=None)[1][0] - true).abs().max() > 0.1


def of_real_rows(seed=0, size=1.0, n=1500, clusters=6, chosen=40, n_best=1500):
    """Rows in clusters far apart, the heaviest of which are visited; each head's best were scored.

    A case, and attention over all.
    """
    own = case(batch=1, n_kv=1, seed=seed)
    rng = torch.Generator().manual_seed(seed)
    dim = own.q.shape[2]
    number = (torch.arange(n) / n).sqrt().mul(clusters).long().clamp(max=clusters - 1)
    k = (
        0.5 * torch.randn(n, dim, generator=rng)
        + 2 * torch.randn(clusters, dim, generator=rng)[number]
    )
    v = torch.randn(n, dim, generator=rng) + 0.5 * k @ torch.randn(dim, dim, generator=rng) / 4
    q = size * own.q
    scores = SCALE * (q[0] @ k.mT)
    visited = torch.zeros(n, dtype=torch.bool)
    visited[scores.softmax(1).sum(0).topk(chosen).indices] = True
    inside = scores.masked_fill(~visited, -torch.inf)
    seen = visited.clone()
    seen[scores.topk(n_best).indices.unique()] = True
    lse = scores.masked_fill(visited | ~seen, -torch.inf).logsumexp(1)
    scored = Scored(lse[None], torch.zeros(1, 1, dim), seen.sum().view(1, 1), n_best)
    own = Case(
        (inside.softmax(1) @ v)[None], inside.logsumexp(1)[None], q,
        moments_of(k[None, None], v[None, None], clusters),
        torch.full((1, 1, 1), chosen, dtype=torch.int32), {}, scored,
    )  # fmt: skip
    return own, (scores.softmax(1) @ v)[None], scores.logsumexp(1)[None]


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
@pytest.mark.parametrize("size", [1.5, 4.0])
def test_the_mean_value_is_that_of_rows_which_weigh_as_much(impl, size):
    """A cluster that is visited in part weighs as much as what is left of it."""
    errors = []
    for seed in range(4):
        own, out, lse = of_real_rows(seed, size)
        for scored in (own.scored, None):
            found = own.run(impl, scored=scored)
            errors.append(float((found[0] - out).norm() / out.norm()))
            assert scored is None or (found[1] - lse).abs().max() < 1e-5
    assert sum(errors[::2]) < 0.7 * sum(errors[1::2])


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_where_few_rows_weigh_enough(impl):
    """A least weight is a share of all attention, also of what is left out."""
    own, out, lse = of_real_rows(size=0.3, chosen=5, n_best=200)
    own.bounds = {"min_weight": 0.01, "max_tokens": 400}
    found = own.run(impl)
    assert (found[1] - lse).abs().max() < 0.4
    assert (found[0] - out).norm() < 0.2 * out.norm()
    assert (own.run(impl, scored=None)[0] - out).norm() > 0.5 * out.norm()


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
@pytest.mark.parametrize("min_weight", [None, 1e-4])
def test_scores_that_cannot_be_are_bounded(impl, min_weight):
    """None of the rows that were left out weighs more than the chosen ones do."""
    own, _, _ = of_real_rows()
    own.bounds = {"min_weight": min_weight, "max_tokens": 400}
    wrong = dataclasses.replace(own.scored, lse=own.scored.lse + 1000)
    most = 1460 * 3 / 40 if min_weight is None else 0.146 / (1 - 0.146)
    found = own.run(impl, scored=wrong)
    torch.testing.assert_close(found[1], own.lse + math.log1p(most), rtol=1e-4, atol=1e-4)
    assert found[0].isfinite().all()


def test_what_was_scored_is_checked():
    own = case()
    fine = scored_of(own)
    for name, wrong in (
        ("lse", fine.lse[:, :3]), ("mean", fine.mean.double()), ("n_scored", fine.n_scored.int()),
        ("n_scored", fine.n_scored[:1]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} of scored rows must be"):
            own.run(None, scored=dataclasses.replace(fine, **{name: wrong}))
    for name, wrong in (("n_best", -1), ("one_of", -2), ("n_best", 2**63)):
        with pytest.raises(ValueError, match=f"{name} must be in .*; got {wrong}"):
            own.run(None, scored=dataclasses.replace(fine, **{name: wrong}))


@pytest.mark.parametrize("heads", [None, 6])
def test_what_was_scored_changes_between_calls(heads):
    own = case(heads=heads)
    scored = scored_of(own)
    prepared = PreparedRest(own.moments, own.lengths, scored, sm_scale=SCALE, max_tokens=9)
    assert prepared.fits(own.moments, own.lengths, scored, sm_scale=SCALE, max_tokens=9)
    assert not prepared.fits(own.moments, own.lengths, None, sm_scale=SCALE, max_tokens=9)
    own.bounds = {"max_tokens": 9}
    for seed in range(3):
        other = dataclasses.replace(case(seed=seed), lengths=own.lengths, moments=own.moments)
        scored.lse.copy_(other.lse - 1)
        scored.mean.mul_(1.1)
        scored.n_scored.add_(seed)
        found = prepared(other.out.clone(), other.lse.clone(), other.q)
        expected = dataclasses.replace(other, scored=scored, bounds=own.bounds).run(None)
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("heads", [None, 6])
def test_prepared(heads):
    """The same to the bit, for queries, lengths and moments that change, and for others."""
    own = case(heads=heads)
    prepared = PreparedRest(own.moments, own.lengths, sm_scale=SCALE, max_tokens=9)
    for seed in range(4):
        other = case(heads=heads, seed=seed)
        own.lengths.copy_(other.lengths)
        own.moments.spread.copy_(other.moments.spread)
        own.moments.n_rows.fill_(400 + seed)
        found = prepared(other.out.clone(), other.lse.clone(), other.q)
        expected = dataclasses.replace(other, moments=own.moments, bounds={"max_tokens": 9}).run(
            None
        )
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
    wide = own.q.repeat(1, 1, 2)[..., ::2]  # not contiguous
    assert torch.equal(
        prepared(own.out.clone(), own.lse.clone(), wide)[0],
        prepared(own.out.clone(), own.lse.clone(), wide.contiguous())[0],
    )
    assert copy.deepcopy(prepared) is None


def test_what_a_prepared_estimate_fits():
    own = case()
    options = {"sm_scale": SCALE, "max_tokens": 9, "min_weight": None}
    prepared = PreparedRest(own.moments, own.lengths, **options)
    assert prepared.fits(own.moments, own.lengths, **options)
    assert prepared.fits(own.moments, own.lengths[:], **options)  # another view of the same
    assert not prepared.fits(own.moments, own.lengths.clone(), **options)
    assert not prepared.fits(own.moments, own.lengths[..., :-1], **options)
    assert not prepared.fits(dataclasses.replace(own.moments), own.lengths, **options)
    for name, value in (("sm_scale", 0.2), ("max_tokens", 8), ("min_weight", 0.1)):
        assert not prepared.fits(own.moments, own.lengths, **{**options, name: value})


def test_the_quantile():
    above = torch.linspace(1e-4, 1 - 1e-4, 999, dtype=torch.float64)
    exact = torch.special.ndtri(1 - above)
    assert (quantile(above) - exact).abs().max() < 4.6e-4


@pytest.mark.parametrize("spread", [0.3, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("deviations", [-1.5, 0.5, 2.5])
def test_the_lower_of_normal_scores(spread, deviations):
    n, most = 200_000, deviations * spread
    scores = spread * torch.special.ndtri((torch.arange(n).double() + 0.5) / n)
    lower = scores[scores < most]
    log_mean, shift = below(torch.tensor(most).double(), torch.tensor(spread**2).double())
    assert float(log_mean) == pytest.approx(float(lower.exp().sum().log()) - math.log(n), abs=2e-3)
    mean = float((lower.softmax(0) * lower).sum())
    assert float(shift) * spread**2 == pytest.approx(mean, abs=2e-3 * spread)


def test_scores_far_apart_are_as_exact_as_near_ones():
    """In float32, where the terms of the formula are millions and cancel."""
    most, variance = torch.meshgrid(torch.linspace(-3, 4, 30), torch.logspace(-6, 7, 30),
                                    indexing="ij")  # fmt: skip
    most = most * variance.sqrt()
    for found, exact in zip(below(most, variance), below(most.double(), variance.double()),
                            strict=True):  # fmt: skip
        assert found.isfinite().all()
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_clusters_that_nobody_is_in(impl):
    """They change nothing, whatever is said of them."""
    own = case()
    parts = vars(own.moments)
    wider = {
        name: torch.cat([parts[name], torch.full_like(parts[name], 7.0)], axis)
        for name, axis in (("keys", 3), ("values", 2), ("sizes", 3))
    }
    wider["sizes"][:, :, 0, 5:] = 0
    found = own.run(impl, moments=dataclasses.replace(own.moments, **wider))
    for a, b in zip(found, own.run(impl), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_rows_in_clusters_are_found_as_dense_attention_finds_them():
    """Where there are clusters, knowing them is worth more than all rows' mean and covariance."""
    torch.manual_seed(0)
    n, dim, clusters = 20_000, 16, 8
    number = (torch.arange(n) / n).sqrt().mul(clusters).long()
    centers = torch.randn(clusters, 2 * dim)
    k, v = (torch.randn(n, dim) * 0.5 + own for own in centers[number].split(dim, 1))
    q = torch.randn(1, 1, dim) * 3
    scores = SCALE * (k @ q[0, 0])
    best = scores.topk(n // 50).indices
    exact = scores.softmax(0) @ v
    out, lse = scores[best].softmax(0) @ v[best], scores[best].logsumexp(0)
    visited = torch.tensor([[[len(best)]]], dtype=torch.int32)
    errors = []
    for known in (1, clusters):
        found, _ = add_rest(
            out[None, None].clone(), lse[None, None].clone(), q,
            moments_of(k[None, None], v[None, None], known), visited, sm_scale=SCALE,
        )  # fmt: skip
        errors.append(float((found[0, 0] - exact).norm() / exact.norm()))
    assert errors[1] < 0.03
    assert errors[1] < 0.3 * errors[0]


def test_normal_rows_are_found_as_dense_attention_finds_them():
    """Where keys and values are normal, visiting 5 % and an estimate are nearly all."""
    torch.manual_seed(0)
    n, dim = 20_000, 16
    k = torch.randn(1, 1, n, dim) @ torch.randn(dim, dim) * 0.4
    v = torch.randn(1, 1, n, dim) + k @ torch.randn(dim, dim) * 0.3
    q = torch.randn(1, 4, dim) * 2
    for head in range(4):
        scores = SCALE * (k[0, 0] @ q[0, head])
        best = scores.topk(n // 20).indices
        exact, exact_lse = scores.softmax(0) @ v[0, 0], float(scores.logsumexp(0))
        out, lse = scores[best].softmax(0) @ v[0, 0, best], scores[best].logsumexp(0)
        visited = torch.tensor([[[len(best)]]], dtype=torch.int32)
        found, found_lse = add_rest(
            out[None, None].clone(), lse[None, None].clone(), q[:, head : head + 1],
            moments_of(k, v), visited, sm_scale=SCALE,
        )  # fmt: skip
        error = (found[0, 0] - exact).norm()
        assert error < 0.1 * (out - exact).norm()
        assert error < 0.03 * exact.norm()
        assert float(found_lse) == pytest.approx(exact_lse, abs=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lse": torch.zeros(2, 5)}, "out and lse must be"),
        ({"lse": torch.zeros(2, 6, dtype=torch.float64)}, "lse must be float32; got .*float64"),
        (
            {"lengths": torch.zeros(2, 4, 3, dtype=torch.int32)},
            r"lengths must be \[2, 2 or 6, R\]",
        ),
        ({"lengths": torch.zeros(2, 2, 3)}, "must be int32; got torch.float32"),
        ({"out": torch.zeros(2, 6, 8)}, "out and lse must be"),
    ],
)
@pytest.mark.bad_input
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        case().run(None, **change)


@pytest.mark.bad_input
def test_moments_that_do_not_fit():
    own = case()
    for change, message in (
        ({"spread": own.moments.spread[:, :, 1:]}, r"spread must be \[2, Hkv, 16, 32\]"),
        ({"spread": own.moments.spread.float()}, "spread must be bfloat16; got torch.float32"),
        ({"means": own.moments.means[:, :, 1:]}, r"means must be \(2, 2, 32\)"),
        ({"means": own.moments.means.double()}, "means must be float32; got .*float64"),
        ({"keys": own.moments.keys[:, :, 1:]}, r"keys must be \(2, 2, 16, 5\); got .*15, 5\)"),
        ({"values": own.moments.values[:, :, 1:]}, r"values must be \(2, 2, 5, 16\)"),
        ({"sizes": own.moments.sizes[:, :, 1:]}, r"sizes must be \(2, 2, 2, 5\)"),
        ({"values": own.moments.values.float()}, "values must be bfloat16; got torch.float32"),
        ({"n_rows": own.moments.n_rows[1:]}, r"n_rows must be \[2\]"),
        ({"n_rows": own.moments.n_rows.long()}, "must be int32; got .*int64"),
    ):
        with pytest.raises(ValueError, match=message):
            own.run(None, moments=dataclasses.replace(own.moments, **change))
    with pytest.raises(
        ValueError, match=r"impl 'numba' needs float32 on the CPU; got torch\.f.*64"
    ):
        own.run("numba", torch.float64)
