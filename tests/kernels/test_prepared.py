"""What a decode step prepares for the next one: the same results, and no memory but its own."""

import copy
import pickle
import threading

import pytest
import torch

from saap.kernels.attention import PreparedRanges, attend_ranges
from saap.kernels.codes import PreparedChoice, QueryMap, encode, select_rows

N = 300


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention(impl=None):
    k, v = random(2, 1, 2, N, 16)
    starts = torch.tensor([[[0, 40, 290], [5, 100, 0]]], dtype=torch.int32)
    lengths = torch.tensor([[[10, 30, 10], [60, 100, 0]]], dtype=torch.int32)
    given = k, v, starts, lengths
    return PreparedRanges(random(1, 4, 16), *given, sm_scale=0.3, impl=impl), given


def coded(seed=0):
    return encode(random(1, 2, N, 64, seed=seed), torch.ones(1, 2, 64))


def choice(codes, q, impl=None):
    room = torch.zeros(2, 1, 2, 20, dtype=torch.int32)
    options = {
        "max_tokens": 20, "n_candidates": 50, "share": "group", "first_row": 4,
        "out": tuple(room), "scored": torch.zeros(1, 2, dtype=torch.int64), "impl": impl,
    }  # fmt: skip
    return PreparedChoice(q, codes, [N], **options), options


@pytest.mark.parametrize("impl", ["reference", "numba"])
def test_attention_follows_what_the_tensors_hold(impl):
    prepared, (k, v, starts, lengths) = attention(impl)
    for seed in range(3):
        q = random(1, 4, 16, seed=seed)
        k.copy_(random(*k.shape, seed=seed + 7))
        lengths[0, 1, 1] = 50 + seed
        expected = attend_ranges(q, k, v, starts, lengths, sm_scale=0.3, impl=impl)
        assert all(map(torch.equal, prepared(q), expected))


@pytest.mark.parametrize("impl", ["reference", "numba"])
@pytest.mark.parametrize(
    ("start", "length", "message"),
    [
        (0, -1, "lengths must be at least 0; got .* = -1"),
        (-5, 3, "starts must be at least 0; got .* = -5"),
        (N - 1, 2, "start . length must be at most N = 300"),
        (2**31 - 1, 2**31 - 1, "start . length must be at most N = 300"),
    ],
)
def test_attention_looks_at_the_ranges_of_each_call(impl, start, length, message):
    prepared, (_, _, starts, lengths) = attention(impl)
    prepared(random(1, 4, 16))
    starts[0, 0, 1], lengths[0, 0, 1] = start, length
    with pytest.raises(ValueError, match=message):
        prepared(random(1, 4, 16))


def test_a_range_that_is_not_used_begins_anywhere():
    prepared, (_, _, starts, _) = attention("numba")
    before = prepared(random(1, 4, 16))
    starts[0, 1, 2] = -7
    assert all(map(torch.equal, prepared(random(1, 4, 16)), before))


def test_attention_fits_the_very_tensors_alone():
    prepared, given = attention()
    q = random(1, 4, 16)
    assert prepared.fits(q, *given, sm_scale=0.3)
    assert not prepared.fits(q, *given, sm_scale=0.2)
    assert not prepared.fits(q.double(), *given, sm_scale=0.3)
    assert not prepared.fits(q.repeat(1, 2, 1), *given, sm_scale=0.3)
    for i in range(4):
        other = [t.clone() if i == place else t for place, t in enumerate(given)]
        assert not prepared.fits(q, *other, sm_scale=0.3)


def test_ranges_that_would_be_copied_are_refused():
    _, (k, v, starts, lengths) = attention()
    with pytest.raises(ValueError, match="starts must be contiguous; got strides"):
        PreparedRanges(random(1, 4, 16), k, v, starts[..., ::2], lengths[..., ::2])


@pytest.mark.parametrize("impl", ["reference", "numba"])
def test_a_choice_follows_what_the_codes_hold(impl):
    codes, q = coded(), random(1, 4, 64)
    prepared, options = choice(codes, q, impl)
    for seed in range(3):
        new, q = coded(seed), random(1, 4, 64, seed=seed)
        for name in ("coarse", "fine", "scale"):
            getattr(codes, name).copy_(getattr(new, name))
        own = {n: options[n] for n in ("max_tokens", "n_candidates", "first_row")}
        starts, lengths = select_rows(q, new, [N], impl=impl, **own)
        found = prepared(q)
        assert found[0] is options["out"][0]
        assert torch.equal(found[0][..., : starts.shape[2]], starts)
        assert torch.equal(found[1][..., : starts.shape[2]], lengths)
        assert not found[1][..., starts.shape[2] :].any()
        assert (options["scored"] >= 50).all()


def test_a_choice_fits_the_very_tensors_alone():
    codes, q = coded(), random(1, 4, 64)
    prepared, options = choice(codes, q)
    assert prepared.fits(q, codes, [N], **options)
    assert prepared.fits(q, codes, [N - 1], **options)
    assert not prepared.fits(q, codes, [N + 1], **options)
    assert not prepared.fits(q, codes, [-1], **options)
    assert not prepared.fits(q, codes, [N, N], **options)
    assert not prepared.fits(q, copy.deepcopy(codes), [N], **options)
    assert not prepared.fits(q, codes, [N], **{**options, "first_row": 3})
    other = tuple(t.clone() for t in options["out"])
    assert not prepared.fits(q, codes, [N], **{**options, "out": other})


@pytest.mark.parametrize(("max_tokens", "n_candidates"), [(20, 50), (20, 600), (450, 600)])
def test_a_choice_follows_the_rows(max_tokens, n_candidates):
    """As rows join, which the codes have room for, until other buffers are needed."""
    n, batch = 1200, 2
    codes = encode(random(batch, 2, n, 64), torch.ones(batch, 2, 64))
    q = random(batch, 4, 64)
    room = torch.zeros(2, batch, 2, max_tokens, dtype=torch.int32)
    options = {
        "max_tokens": max_tokens, "n_candidates": n_candidates, "share": "group", "impl": "numba"
    }  # fmt: skip
    places = {"out": tuple(room), "scored": torch.zeros(batch, 2, dtype=torch.int64)}
    prepared, n_made = None, 0
    for n_rows in ([460, 9], [470, 460], [500, 0], [512, 3], [513, 512], [700, 900], [1200, 1]):
        if prepared is None or not prepared.fits(q, codes, n_rows, **places, **options):
            prepared = PreparedChoice(q, codes, n_rows, **places, **options)
            n_made += 1
        scored = torch.zeros_like(places["scored"])
        starts, lengths = select_rows(q, codes, n_rows, scored=scored, **options)
        found = prepared(q)
        used = starts.shape[2]
        assert torch.equal(found[0][..., :used], starts)
        assert torch.equal(found[1][..., :used], lengths)
        assert not found[1][..., used:].any()
        assert torch.equal(places["scored"], scored)
    assert 3 <= n_made <= 4
    narrow = {**places, "out": tuple(t[..., :5].contiguous() for t in room)}
    small = PreparedChoice(q, codes, [5, 5], **narrow, **options)
    assert not small.fits(q, codes, [6, 5], **narrow, **options)


def test_a_copy_is_no_preparation():
    """The addresses in it would be those of the tensors that it was made for."""
    for prepared in (attention()[0], choice(coded(), random(1, 4, 64))[0]):
        assert copy.deepcopy(prepared) is None
        assert pickle.loads(pickle.dumps(prepared)) is None


def test_a_copy_of_codes_is_chosen_from_by_itself():
    codes, q = coded(), random(1, 4, 64)
    options = {"max_tokens": 20, "n_candidates": 50, "impl": "numba"}
    before = [t.clone() for t in select_rows(q, codes, [N], **options)]
    copied = copy.deepcopy(codes)
    for name in ("coarse", "fine", "scale"):
        getattr(codes, name).zero_()
    assert all(map(torch.equal, select_rows(q, copied, [N], **options), before))


def test_threads_may_use_one_preparation():
    prepared, _ = attention("numba")
    queries = [random(1, 4, 16, seed=seed) for seed in range(4)]
    expected = [prepared(q) for q in queries]
    wrong = []

    def work(i):
        for _ in range(200):
            if not all(map(torch.equal, prepared(queries[i]), expected[i])):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def beside_case(batch, maps, n_rows, dim=64, group=2):
    """A choice for queries that a map makes coordinates of, and rows beside those it is from."""
    codes = encode(random(batch, 2, N, 64), torch.ones(batch, 2, 64))
    query_map = QueryMap.of(random(maps, 2, 64, dim, seed=1) / dim)
    room = torch.zeros(2, batch, 2, 20, dtype=torch.int32)
    q = random(batch, 2 * group, dim, seed=2)
    prepared = PreparedChoice(
        q, codes, n_rows, max_tokens=20, n_candidates=50, share="group", first_row=4,
        query_map=query_map, out=tuple(room), scored=torch.zeros(batch, 2, dtype=torch.int64),
        impl="numba",
    )  # fmt: skip
    k = random(batch, 2, 200, dim, seed=3)
    starts = torch.tensor([0, 50]).int().expand(batch, 2, 2).contiguous()
    lengths = torch.tensor([7, 23]).int().expand(batch, 2, 2).contiguous()
    lengths[-1, :, 1] = 31
    return prepared, q, (k, starts, lengths, random(maps, 2, dim, seed=4), 0.3)


def outside_of(q, k, starts, lengths, mean, sm_scale):
    """Against float64: the log-sum-exp of the scores with keys less their mean."""
    out = torch.empty(q.shape[:2])
    for b, heads in enumerate(q.double().unflatten(1, (2, -1))):
        for h, own in enumerate(heads):
            ranges = zip(starts[b, h].tolist(), lengths[b, h].tolist(), strict=True)
            rows = torch.cat([k[b, h, s : s + n] for s, n in ranges]).double()
            rows = rows - mean[b if len(mean) > 1 else 0, h].double()
            group = len(own)
            out[b, h * group : (h + 1) * group] = (sm_scale * own @ rows.T).logsumexp(-1).float()
    return out


@pytest.mark.parametrize(
    ("batch", "maps", "n_rows"), [(1, 1, [N]), (1, 1, [40]), (3, 1, [N, 90, 45]), (3, 3, [N] * 3)]
)
@pytest.mark.parametrize(("group", "dim"), [(1, 64), (2, 64), (2, 128), (4, 80)])
def test_rows_beside_those_of_a_choice_count_as_their_log_sum_exp(batch, maps, n_rows, group, dim):
    prepared, q, rows = beside_case(batch, maps, n_rows, dim, group)
    scales = torch.tensor([1.0, 3.0]).repeat(group)[: 2 * group, None]  # some look at few rows
    choose, wrong, different = prepared.beside(*rows), 0, 0
    for seed in range(40):
        q = scales * random(*q.shape, seed=seed)
        expected = visited(prepared(q, outside_of(q, *rows)))
        wrong += int((visited(choose(q)) != expected).sum())
        different += int((visited(prepared(q)) != expected).sum())
        rows[2][:, :, 1] += 1  # as a tail grows
    # Where a group has one head, nothing depends on it. Else a row here and there is as good as
    # another within rounding.
    assert wrong == 0 if group == 1 else wrong <= 0.02 * different
    assert different == 0 if group == 1 else different > 100


def visited(ranges):
    """Which rows are in the ranges of each query and head."""
    row = torch.arange(N + 4)
    starts, lengths = (t[..., None] for t in ranges)
    return ((row >= starts) & (row < starts + lengths)).any(2)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_rows_beside_those_of_a_choice_that_are_not_finite(value):
    prepared, q, rows = beside_case(1, 1, [N])
    before = [t.clone() for t in prepared(q)]
    k, _, lengths, *_ = rows
    lengths.zero_()
    assert all(map(torch.equal, prepared.beside(*rows)(q), before))  # none at all
    lengths[..., 0] = 7
    k[0, :, 3] = value
    for choose in (prepared.beside(*rows), lambda q: prepared(q, outside_of(q, *rows))):
        found = [t.clone() for t in choose(q)]
        assert int(found[1].sum()) == 2 * 20
        if value is torch.nan:
            assert all(map(torch.equal, found, before))


def test_rows_beside_those_of_a_choice_are_within_their_tensor():
    prepared, q, rows = beside_case(1, 1, [N])
    _, starts, lengths, *_ = rows
    starts[..., 0], lengths[..., 0], lengths[..., 1] = 150, 50, 0
    before = visited(prepared.beside(*rows)(q))
    lengths[..., 0], starts[..., 1], lengths[..., 1] = 2**31 - 1, -(2**31), 2**31 - 1
    assert torch.equal(visited(prepared.beside(*rows)(q)), before)
    starts[..., 1], lengths[..., 1] = -5, 28  # rows 0 to 22
    after = visited(prepared.beside(*rows)(q))
    starts[..., 1], lengths[..., 1] = 0, 23
    assert torch.equal(visited(prepared.beside(*rows)(q)), after)


def test_what_is_beside_a_choice_is_left_to_others_where_it_must_be():
    prepared, q, (k, *rest) = beside_case(1, 1, [N])
    assert prepared.beside(k.bfloat16(), *rest) is None
    assert prepared.beside(k.mT.contiguous().mT, *rest) is None
    codes = coded()
    assert choice(codes, q)[0].beside(k, *rest) is None  # no map: queries are coordinates
    assert choice(codes, q, "reference")[0].beside(k, *rest) is None
