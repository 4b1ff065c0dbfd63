"""What a decode step prepares for the next one: the same results, and no memory but its own."""

import copy
import pickle
import threading

import pytest
import torch

from saap.kernels.attention import PreparedRanges, attend_ranges
from saap.kernels.codes import PreparedChoice, encode, select_rows

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
