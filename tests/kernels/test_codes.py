"""Coded keys: what the codes keep of a key, and the rows that they choose."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saap.kernels.codes import Codes, QueryMap, coding, decode, encode, select_rows
from saap.kernels.codes import numba as numba_backend
from saap.kernels.cpu import functions

from ..torch_threads import torch_threads
from .code_cases import rows, whole_numbers

IMPLS = ("reference", "numba")
CANARY = -77


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def coded(batch=1, n_kv=2, n=300, coordinates=64, seed=0):
    x = random(batch, n_kv, n, coordinates, seed=seed)
    importance = torch.linspace(2.0, 0.1, coordinates).expand(1, n_kv, -1)
    return x, encode(x, importance), importance


@pytest.mark.parametrize("coordinates", [64, 128, 256])
def test_codes_are_about_the_coordinates(coordinates):
    x, codes, _ = coded(n=2000, coordinates=coordinates)
    error = ((decode(codes) - x) ** 2).mean((0, 1, 2))
    # Uniform quantizers of a normal variable lose 0.0035 with 32 levels, 0.0115 with 16, 0.0374
    # with 8, 0.119 with 4 and 0.36 with 2; the steps here are made for the coarse code, too.
    most = (0.02, 0.02, 0.02, 0.05, 0.05, 0.16, 0.16, 0.4)
    for own, bound in zip(error.chunk(8), most, strict=True):
        assert (own < bound).all()
    assert codes.coarse_bytes == coordinates // 16 + 1
    assert codes.fine_bytes == coordinates * 5 // 16


def test_inner_products_are_right_in_the_mean():
    """The scale of a key undoes that quantizers draw towards 0."""
    x, codes, importance = coded(n=4000)
    found, true = decode(codes), x
    weighed = (found * true * importance[:, :, None]).sum(-1)
    own = (true * true * importance[:, :, None]).sum(-1)
    assert float((weighed / own).mean()) == pytest.approx(1.0, abs=0.01)


def test_the_size_that_errs_least_is_kept(monkeypatch):
    """Above all where a key has a few large coordinates, beyond a quantizer's last step."""
    x, importance = random(1, 2, 2000, 64), torch.linspace(2.0, 0.1, 64).expand(1, 2, -1)
    x = x * (1 + 2 * (random(1, 2, 2000, 64, seed=7) > 1.5))

    def error():
        found = decode(encode(x, importance))
        return ((found - x).square() * importance[:, :, None]).sum(-1)

    best = error()
    each = []
    for size in coding.SIZES:
        monkeypatch.setattr(coding, "SIZES", (size,))
        each.append(error())
    least = torch.stack(each).amin(0)
    assert float(best.sum()) < 1.1 * float(least.sum())  # what coarse codes say counts, too
    assert float(best.sum()) < 0.85 * float(each[0].sum())


def test_zero_and_nan_keys_are_coded():
    x, _, importance = coded(n=8)
    x[0, 0, 3], x[0, 0, 4], x[0, 0, 5, 7] = 0.0, torch.nan, torch.inf
    found = decode(encode(x, importance))
    assert (found[0, 0, 3:5].abs() < 0.06).all()  # a sign, by the least scale
    assert found.isfinite().all()


def best_weight(q, codes, n, n_kv, k, chosen):
    """Share of the k best rows' weight that the chosen rows have, by all of the codes, in float64;
    `q [Hq, P]`."""
    x = decode(codes)[0, :, :n].double()
    weights = (q.double().unflatten(0, (n_kv, -1)) @ x.mT).softmax(-1).sum(1)
    best = weights.topk(k).values.sum(-1)
    return [
        float(own[rows].sum() / most)
        for own, rows, most in zip(weights, chosen, best, strict=True)
    ]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("coordinates", [64, 128, 320])
@pytest.mark.parametrize("group", [1, 3, 4, 6])
def test_all_candidates_are_chosen_from(impl, coordinates, group):
    """A query in bytes puts a row here and there on the other side of an edge."""
    _, codes, _ = coded(n=757, coordinates=coordinates)
    q = random(1, 2 * group, coordinates, seed=1) * 0.3
    found = select_rows(q, codes, [750], max_tokens=40, n_candidates=750, impl=impl)
    chosen = [rows(found, 0, h) for h in range(2)]
    assert all(len(own) == 40 for own in chosen)
    assert min(best_weight(q[0], codes, 750, 2, 40, chosen)) > 0.995


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 3000),
    max_tokens=st.integers(0, 400),
    width=st.sampled_from([1, 2, 5, 100]),
    group=st.integers(1, 5),
    share=st.sampled_from(["group", "head"]),
    threads=st.sampled_from([1, 3]),
    min_weight=st.sampled_from([None, 1e-30, 1e-4, 2e-3, 0.1]),
    with_outside=st.booleans(),
    one_of=st.sampled_from([None, 1, 2, 5, 50]),
)
def test_numba_chooses_as_the_reference(
    seed, n, max_tokens, width, group, share, threads, min_weight, with_outside, one_of
):
    """Three threads divide tasks, one does a task at a time."""
    _, codes, _ = coded(batch=2, n=n, seed=seed)
    q = random(2, 2 * group, 64, seed=seed + 1) * 0.5
    n_rows = [n, max(0, n - 37)]
    options = {
        "max_tokens": max_tokens, "n_candidates": width * max_tokens, "share": share,
        "min_weight": min_weight, "one_of": one_of,
    }  # fmt: skip
    if with_outside:
        options["outside"] = 8 * random(2, 2 * group, seed=seed + 2)
    heads = 2 if share == "group" else 2 * group
    room = min(max_tokens, n)
    memory = torch.full((2, 2, heads, room + 8), CANARY, dtype=torch.int32)
    out = tuple(memory[..., 4 : 4 + room])
    scored = torch.full((2, 2, heads), CANARY)
    left_out = torch.full((2, 2, 2 * group), torch.nan)
    with torch_threads(threads):
        found = select_rows(
            q, codes, n_rows, **options, first_row=3, out=out, scored=scored[0],
            left_out=left_out[0], impl="numba",
        )  # fmt: skip
    options |= {"scored": scored[1], "left_out": left_out[1]}
    true = select_rows(q, codes, n_rows, **options, first_row=3, impl="reference")
    of_heads = left_out.unflatten(2, (heads, -1))
    assert ((scored[0] - scored[1]).abs() <= 2 + scored[1] // 50).all()
    assert (memory[..., :4] == CANARY).all()
    assert (memory[..., 4 + room :] == CANARY).all()
    for i in range(2):
        for h in range(heads):
            own, other = rows(found, i, h), rows(true, i, h)
            if min_weight is None:
                assert len(own) == len(other) == min(max_tokens, n_rows[i])
            assert len(own) <= max_tokens
            assert own == sorted(set(own))
            assert all(3 <= row < 3 + n_rows[i] for row in own)
            # Sums in another order put a row here and there on the other side of an edge.
            assert len(set(own) ^ set(other)) <= 2 + 2 * (len(own) // 50)
            if own == other and scored[0, i, h] == scored[1, i, h]:
                torch.testing.assert_close(*of_heads[:, i, h], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("impl", ["reference", "numba"])
def test_a_longer_sequence_has_more_candidates(impl):
    """Of each sequence, whatever others there are beside it."""
    _, codes, _ = coded(batch=2, n=3000, n_kv=1)
    q = random(2, 1, 64, seed=1)
    options = {"max_tokens": 50, "n_candidates": 200, "one_of": 8, "impl": impl}
    scored = torch.zeros(2, 1, dtype=torch.int64)
    found = select_rows(q, codes, [3000, 900], **options, scored=scored)
    assert scored.flatten().tolist() == [375, 200]
    short = Codes(codes.coarse[1:], codes.fine[1:], codes.scale[1:])
    alone = select_rows(q[1:], short, [900], **options)
    assert rows(found, 1, 0) == rows(alone, 0, 0)
    with pytest.raises(ValueError, match="one_of must be an integer of at least 1; got 0"):
        select_rows(q, codes, [3000, 900], **{**options, "one_of": 0})


@pytest.mark.parametrize("n_candidates", [700, 4999, 5000])
@pytest.mark.parametrize("min_weight", [None, 1e-3])
@pytest.mark.parametrize("group", [3, 9])
def test_the_choice_does_not_depend_on_threads(n_candidates, min_weight, group):
    """Of 6 tasks, threads do each alone (1, 2), or divide the last ones by heads (4) or all of
    them (16: by heads or by chunks of rows; 5: by chunks where heads are few)."""
    _, codes, _ = coded(batch=2, n=5000, n_kv=3)
    q = random(2, 3 * group, 64, seed=1) * torch.tensor([0.5, 1.0, 40.0]).repeat(group)[:, None]
    options = {"max_tokens": 300, "n_candidates": n_candidates, "min_weight": min_weight}
    for second in (4000, 250, 0):
        found = []
        for threads in (1, 2, 4, 5, 16):
            scored, left_out = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3 * group)
            written = {"scored": scored, "left_out": left_out}
            with torch_threads(threads):
                chosen = select_rows(q, codes, [5000, second], **options, **written)
            found.append((*chosen, *written.values()))
        assert all(all(map(torch.equal, found[0], own)) for own in found)


def test_without_openmp_pythons_threads_choose_the_same(monkeypatch):
    _, codes, _ = coded(batch=2, n=5000, n_kv=3)
    q, options = random(2, 9, 64, seed=1), {"max_tokens": 300, "n_candidates": 700}
    expected = select_rows(q, codes, [5000, 4000], **options)
    for module in (functions, numba_backend):
        monkeypatch.setattr(module, "openmp_address", lambda: 0)
    functions._in_parallel.cache_clear()
    try:
        for threads in (1, 4):
            with torch_threads(threads):
                found = select_rows(q, codes, [5000, 4000], **options)
            assert all(map(torch.equal, found, expected))
    finally:
        functions._in_parallel.cache_clear()


def weights_of(q, codes, n, n_kv, outside):
    """By all of the codes and in float64: what each row weighs for each KV head `[Hkv, n]`."""
    x = decode(codes)[0, :, :n].double()
    scores = q[0].double().unflatten(0, (n_kv, -1)) @ x.mT
    beside = outside[0].double().unflatten(0, (n_kv, -1))[..., None]
    return torch.cat([scores, beside], -1).softmax(-1)[..., :-1].sum(1)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("n_candidates", [600, 700])
def test_rows_that_weigh_enough_are_chosen(impl, n_candidates):
    """A head that looks elsewhere gets none; others as many as weigh so much, however many."""
    _, codes, _ = coded(n=700)
    q = random(1, 4, 64, seed=1) * torch.tensor([0.6, 0.6, 0.1, 0.1])[:, None]
    outside = torch.tensor([[3.0, 3.0, 30.0, 30.0]])
    weights = weights_of(q, codes, 700, 2, outside)
    found = {}
    for least in (1e-2, 2e-3, 5e-4):
        chosen = select_rows(
            q, codes, [700], max_tokens=300, n_candidates=n_candidates, min_weight=least,
            outside=outside, impl=impl,
        )  # fmt: skip
        own, none = (rows(chosen, 0, h) for h in range(2))
        assert none == []
        # Queries in bytes move a weight by a tenth.
        assert set((weights[0] > 1.3 * least).nonzero()[:, 0].tolist()) <= set(own)
        assert set(own) <= set((weights[0] > least / 1.3).nonzero()[:, 0].tolist())
        found[least] = len(own)
    assert 0 < found[1e-2] < found[2e-3] < found[5e-4] < 300
    few = select_rows(
        q, codes, [700], max_tokens=7, n_candidates=n_candidates, min_weight=5e-4,
        outside=outside, impl=impl,
    )  # fmt: skip
    assert set(weights[0].topk(3).indices.tolist()) < set(rows(few, 0, 0))
    assert len(rows(few, 0, 0)) == 7


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("beside", [torch.nan, -torch.inf])
def test_nothing_outside_is_a_softmax_over_the_rows(impl, beside):
    _, codes, _ = coded(n=200)
    q = random(1, 4, 64, seed=5) * 0.5
    options = {"max_tokens": 200, "n_candidates": 200, "min_weight": 0.005, "impl": impl}
    without = select_rows(q, codes, [200], **options)
    found = select_rows(q, codes, [200], outside=torch.full((1, 4), beside), **options)
    assert all(rows(found, 0, h) == rows(without, 0, h) != [] for h in range(2))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_larger_budget_keeps_the_best_row(impl):
    x, codes, _ = coded(n=500)
    q = 3 * x[:, :, 123].repeat_interleave(2, 1)
    for max_tokens in (1, 5, 50, 500):
        found = select_rows(
            q, codes, [500], max_tokens=max_tokens, n_candidates=4 * max_tokens, impl=impl
        )
        assert all(123 in rows(found, 0, h) for h in range(2))


@pytest.mark.parametrize("impl", IMPLS)
def test_many_queries_of_one_context(impl):
    _, codes, _ = coded(n=200)
    q = random(5, 4, 64, seed=4)
    options = {"max_tokens": 20, "n_candidates": 80, "impl": impl}
    together = select_rows(q, codes, [200], **options)
    for i in range(5):
        alone = select_rows(q[i : i + 1], codes, [200], **options)
        assert [rows(together, i, h) for h in range(2)] == [rows(alone, 0, h) for h in range(2)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_short_sequence_beside_a_long_one_is_chosen_by_whole_codes(impl, threads):
    _, codes, _ = coded(batch=2, n=600)
    q = random(2, 4, 64, seed=3) * 0.5
    scored = torch.zeros(2, 2, dtype=torch.int64)
    with torch_threads(threads):
        both = select_rows(
            q, codes, [600, 90], max_tokens=20, n_candidates=100, scored=scored, impl=impl
        )
        short = Codes(codes.coarse[1:], codes.fine[1:], codes.scale[1:])
        alone = select_rows(q[1:], short, [90], max_tokens=20, n_candidates=100, impl=impl)
    assert [rows(both, 1, h) for h in range(2)] == [rows(alone, 0, h) for h in range(2)]
    assert scored[1].tolist() == [90, 90]


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_queries_choose_as_many_rows(impl):
    _, codes, _ = coded(n=200)
    q = torch.full((1, 4, 64), torch.nan)
    found = select_rows(q, codes, [200], max_tokens=20, n_candidates=50, impl=impl)
    assert all(len(rows(found, 0, h)) == 20 for h in range(2))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 30, 63])
def test_a_query_with_one_nan_counts_for_nothing(impl, value, place):
    _, codes, _ = coded(n=63)
    q = random(1, 4, 64, seed=2)
    q[0, 1, place] = value
    without = q.clone()
    without[0, 1] = 0.0
    options = {"max_tokens": 3, "n_candidates": 63, "impl": impl}
    found, expected = (select_rows(own, codes, [63], **options) for own in (q, without))
    assert [rows(found, 0, h) for h in range(2)] == [rows(expected, 0, h) for h in range(2)]


@pytest.mark.parametrize(
    ("batch", "maps", "share", "dim", "coordinates", "n_candidates"),
    [
        (1, 1, "group", 64, 64, 90),
        (2, 2, "group", 48, 64, 90),
        (2, 2, "head", 64, 64, 10**6),
        (2, 1, "head", 80, 128, 90),
        (3, 1, "group", 256, 256, 10**6),
    ],
)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16])
def test_a_map_of_queries_is_as_its_product(
    batch, maps, share, dim, coordinates, n_candidates, impl, threads, dtype
):
    """By one thread for each task, and where threads share the tasks."""
    _, codes, _ = coded(batch=batch, n=700, coordinates=coordinates)
    q, query_map = whole_numbers(batch, maps, 2, 3, dim, coordinates, dtype=dtype)
    product = torch.einsum(
        "bhgd,bhdp->bhgp",
        q.unflatten(1, (2, 3)).double(), query_map.weights.double().expand(batch, -1, -1, -1),
    ) * query_map.scale[:, :, None]  # fmt: skip
    options = {
        "max_tokens": 40, "n_candidates": n_candidates, "share": share, "impl": impl
    }  # fmt: skip
    n_rows = [700, 500, 3][:batch]
    with torch_threads(threads):
        found = select_rows(q, codes, n_rows, query_map=query_map, **options)
        expected = select_rows(product.flatten(1, 2).float(), codes, n_rows, **options)
    for own, other in zip(found, expected, strict=True):
        assert torch.equal(own, other)


def test_one_context_of_many_queries_has_one_map():
    _, codes, _ = coded(n=300)
    q, query_map = whole_numbers(5, 1, 2, 2, 64, 64)
    options = {"max_tokens": 20, "n_candidates": 60, "query_map": query_map}
    together = select_rows(q, codes, [300], **options)
    for i in range(5):
        alone = select_rows(q[i : i + 1], codes, [300], **options)
        assert [rows(together, i, h) for h in range(2)] == [rows(alone, 0, h) for h in range(2)]


def test_a_map_in_16_bits_hardly_errs():
    """Also where large parts of a coordinate cancel, of which bfloat16 would leave nothing."""
    matrix, q = random(1, 2, 64, 48), random(3, 4, 48, seed=1)
    matrix[..., 0], matrix[..., 1] = 100.0, -100.0
    q[..., :2] = 30.0
    found = QueryMap.of(matrix)(q)
    true = (q.double().unflatten(1, (2, 2)) @ matrix.double().mT).flatten(1, 2)
    half = matrix.abs().amax(-1).repeat_interleave(2, 1) / 2**16  # of a step
    bound = half * q.abs().sum(-1, keepdim=True)
    float32 = 60 * 48 * 100 * 2.0**-24
    assert ((found - true).abs() <= bound * 1.01 + float32).all()
    assert (found - true).abs().mean() < 0.05
    assert QueryMap.of(matrix).nbytes == 2 * (2 * 64 * 48 + 4 * 64)
    assert QueryMap.of(torch.zeros(1, 2, 64, 48))(q).abs().max() == 0


def test_a_map_has_8_bits_where_these_hardly_err():
    """Where large parts of coordinates cancel they err much, and one KV head is enough."""
    matrix, q = random(1, 2, 64, 48), random(2, 5000, 48, seed=1)
    narrow = QueryMap.of(matrix, (q.mT @ q)[None])
    assert narrow.weights.dtype == torch.int8
    assert narrow.nbytes == 2 * (64 * 48 + 4 * 64)
    scores = (q[:, ::9] @ matrix[0].mT) @ random(2, 64, 3000, seed=2)  # keys of unit variance
    own = (narrow.weights * narrow.scale[:, :, None])[0]
    found = (q[:, ::9] @ own) @ random(2, 64, 3000, seed=2)
    error = (found - scores).std((1, 2)) / scores.std((1, 2))
    assert (error / narrow.error(matrix, (q.mT @ q)[None])[0] - 1).abs().max() < 0.05
    matrix[0, 1, :, 0], matrix[0, 1, :, 1] = 100.0, -100.0
    q[1, :, :2] = 30.0
    assert QueryMap.of(matrix, (q.mT @ q)[None]).weights.dtype == torch.int16
    assert QueryMap.of(0 * matrix, (q.mT @ q)[None]).weights.dtype == torch.int16
    assert QueryMap.of(matrix, torch.full((1, 2, 48, 48), torch.nan)).weights.dtype == torch.int16


def bad(change, message):
    return pytest.param(change, message, id=message[:30])


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "message"),
    [
        bad({"q": random(1, 4, 32)}, r"q must be \[n, a multiple of 2, 64\]; got \(1, 4, 32\)"),
        bad({"q": random(1, 3, 64)}, r"q must be \[n, a multiple of 2, 64\]"),
        bad({"q": random(1, 4, 64).double()}, "q must be float32; got torch.float64"),
        bad({"n_rows": [301]}, r"n_rows must be in 0..300; got \[301\]"),
        bad({"n_rows": [1, 2]}, "must be of 1 sequence or of 1; got 1 and 2"),
        bad({"max_tokens": -1}, "max_tokens must be an integer of at least 0; got -1"),
        bad({"max_tokens": 2**70}, "max_tokens must be an integer below 2 .. 63; got"),
        bad({"min_weight": 0.0}, "min_weight must be None or a number above 0; got 0.0"),
        bad({"min_weight": "1"}, "min_weight must be None or a number above 0; got '1'"),
        bad({"outside": torch.zeros(1, 2)}, r"outside must be float32 \[1, 4\] on cpu; got"),
        bad({"share": "all"}, "share must be 'group' or 'head'; got 'all'"),
        bad({"impl": "fast"}, "impl must be None or one of reference, numba, triton; got 'fast'"),
        bad({"impl": "triton"}, "q must be on a CUDA device for impl 'triton'; got cpu"),
        bad({"query_map": whole_numbers(1, 1, 2, 2, 48, 64)[1]}, r"q must be .*, 48\]; got"),
        bad({"query_map": whole_numbers(1, 1, 2, 2, 64, 128)[1]}, "of 64 coordinates; got 1, 2"),
        bad({"query_map": whole_numbers(1, 1, 4, 2, 64, 64)[1]}, "of 2 KV heads and of 64 coord"),
        bad(
            {"query_map": whole_numbers(1, 3, 2, 2, 64, 64)[1]},
            "1 sequence or of 1, of 2 KV",
        ),
        bad(
            {"query_map": QueryMap(torch.zeros(1, 2, 64, 64), torch.zeros(1, 2, 64))},
            r"must be int8 or int16 \[B, Hkv, D, P\].*; got torch.float32 \[1, 2, 64, 64\]",
        ),
        bad(
            {"query_map": QueryMap(torch.zeros(1, 2, 64, 64).short().mT, torch.zeros(1, 2, 64))},
            "query_map must be contiguous; got strides",
        ),
        bad({"out": (torch.zeros(1, 2, 3, dtype=torch.int32),) * 2}, "at least 10"),
    ],
)
def test_bad_input(change, message):
    _, codes, _ = coded()
    given = {"q": random(1, 4, 64), "n_rows": [300], "max_tokens": 10, "n_candidates": 40}
    given |= change
    with pytest.raises(ValueError, match=message):
        select_rows(given.pop("q"), codes, given.pop("n_rows"), **given)


@pytest.mark.bad_input
def test_codes_that_do_not_belong_together():
    _, codes, _ = coded()
    wrong = Codes(codes.coarse, codes.fine[:, :, :200], codes.scale)
    with pytest.raises(ValueError, match=r"codes.fine must be \(1, 2, 300, 5\)"):
        select_rows(random(1, 4, 64), wrong, [300], max_tokens=10, n_candidates=40)
    strided = Codes(codes.coarse, codes.fine.mT.contiguous().mT, codes.scale)
    with pytest.raises(ValueError, match=r"codes.fine must be contiguous"):
        select_rows(random(1, 4, 64), strided, [300], max_tokens=10, n_candidates=40, impl="numba")
