"""What callers do to a store that it was not made for: refused, or as if it had not happened."""

import numpy as np
import pytest
import torch

from saap.budget import Budget
from saap.kv import KVStore, state
from saap.methods import METHODS
from saap.selector import LayerInfo

pytestmark = pytest.mark.many_steps

HKV, HQ, DIM = 2, 4, 32
BUDGET = Budget(max_tokens=40, n_sink=4, window=16)
WHOLE = Budget(max_tokens=10**6, n_sink=4, window=16)
PER_PAIR = 1e4 ** -(torch.arange(0, DIM, 2) / DIM)
WITHOUT = [name for name, method in METHODS.items() if not method.needs_index]
REBUILT = [name for name in WITHOUT if name not in ("dense", "streaming")]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def selector_of(method):
    return METHODS[method]().selector(LayerInfo(sm_scale=DIM**-0.5, inv_freq=PER_PAIR))


def store_of(method, budget=BUDGET):
    return KVStore(selector_of(method), budget)


class Tokens:
    """Random tokens of B sequences, given to stores part by part."""

    def __init__(self, n=2600, batch=1, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.k, self.v = torch.randn(2, batch, HKV, n, DIM, generator=generator)
        self.q = torch.randn(batch, HQ, n, DIM, generator=generator)

    def part(self, first, last):
        k, v, q = (t[:, :, first:last] for t in (self.k, self.v, self.q))
        return k, v, k, q, q

    def fed(self, store, *cuts):
        """The result of the last of several steps, up to each cut."""
        first = store.length
        for last in cuts:
            found = store.step(*self.part(first, last))
            first = last
        return found

    def attention(self, at):
        """Of token `at`, in float64."""
        k, v = (
            t[0, :, : at + 1].repeat_interleave(HQ // HKV, 0).double() for t in (self.k, self.v)
        )
        scores = torch.einsum("hnd,hd->hn", k, self.q[0, :, at].double()) * DIM**-0.5
        return torch.einsum("hn,hnd->hd", scores.softmax(-1), v)


def restored(store, method, budget=BUDGET):
    header, tensors = state.saved(store)
    tensors = {name: t.clone() for name, t in tensors.items()}
    return state.restored(header, tensors, selector_of(method), budget)


@pytest.mark.parametrize("method", WITHOUT)
def test_a_store_that_was_saved_goes_on_and_is_saved_again(method):
    """Numbers of rows that were still to come were wiped once: the second file was unreadable."""
    tokens, kept, plain = Tokens(), store_of(method), store_of(method)
    for first, last in ((0, 700), (700, 701), (701, 760)):
        for at in range(first, last) if last - first < 100 else [first]:
            stop = at + 1 if last - first < 100 else last
            own, other = (store.step(*tokens.part(at, stop)) for store in (kept, plain))
            if method != "saap":  # it learns when it is saved, else at the first step
                assert torch.equal(own[0], other[0])
        opened = restored(kept, method)
        assert opened.lengths == [last]
    kept.truncate(30)
    plain.truncate(30)
    assert tokens.fed(kept, 731)[0].isfinite().all()
    assert restored(kept, method).lengths == [731]


@pytest.mark.parametrize("method", REBUILT)
def test_a_store_saved_while_short_is_exact_after_it_grew_and_was_cut(method):
    tokens, store = Tokens(), store_of(method, WHOLE)
    tokens.fed(store, 20)
    state.saved(store)
    tokens.fed(store, 620, 621)
    store.truncate(521)
    out, _ = tokens.fed(store, 101)
    assert (out[0, :, 0] - tokens.attention(100)).abs().max() < 1e-5


@pytest.mark.parametrize("method", [name for name in WITHOUT if name != "blend"])
def test_an_opened_store_chooses_as_before_it_was_saved(method):
    tokens, store = Tokens(), store_of(method)
    tokens.fed(store, 1500, 1501)
    opened = restored(store, method)
    for at in range(1501, 1504):
        own, other = (s.step(*tokens.part(at, at + 1)) for s in (store, opened))
        torch.testing.assert_close(own[0], other[0], rtol=0, atol=1e-6)


@pytest.mark.bad_input
@pytest.mark.parametrize("method", ["saap", "dense", "quest"])
@pytest.mark.parametrize("n", [1, 20])
@pytest.mark.parametrize("before", [0, 600])
@pytest.mark.parametrize(("heads", "dim"), [(1, DIM), (3, DIM), (HQ, DIM // 2), (0, DIM)])
def test_queries_of_other_heads_are_refused_and_leave_nothing(method, n, before, heads, dim):
    tokens, store, plain = Tokens(), store_of(method), store_of(method)
    for own in (store, plain):
        if before:
            tokens.fed(own, before)
    k, v, kd, q, qd = tokens.part(before, before + n)
    store.append(k, v, kd)
    wrong = torch.zeros(1, heads, n, dim)
    with pytest.raises(ValueError, match=f"Hq a multiple of the 2 KV heads; got \\(1, {heads}, "):
        store.attend(wrong, wrong)
    with pytest.raises(ValueError, match="q_derope must be like q_rope"):
        store.attend(q, q[..., :4])
    assert torch.equal(store.attend(q, qd)[0], plain.step(k, v, kd, q, qd)[0])
    own, other = (tokens.fed(s, 1000, 1001)[0] for s in (store, plain))
    assert torch.equal(own, other)


@pytest.mark.bad_input
@pytest.mark.parametrize("n", [1, 20])
def test_scores_that_cannot_be_are_refused_and_leave_nothing(n):
    tokens, store, plain = Tokens(), store_of("saap"), store_of("saap")
    for own in (store, plain):
        tokens.fed(own, 600)
    k, v, kd, q, qd = tokens.part(600, 600 + n)
    store.append(k, v, kd)
    for wrong in ({"softcap": -1.0}, {"softcap": float("nan")}, {"sm_scale": float("inf")}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            store.attend(q, qd, **wrong)
    with pytest.raises(ValueError, match="needs max_tokens, the most rows of a step"):
        store.attend(q, qd, Budget(min_weight=0.1))
    with pytest.raises(ValueError, match="needs max_tokens, the most rows of a step"):
        store.select(q[:, :, -1], qd[:, :, -1], Budget(min_weight=0.1))
    assert torch.equal(store.attend(q, qd)[0], plain.step(k, v, kd, q, qd)[0])
    own, other = (tokens.fed(s, 1000, 1001)[0] for s in (store, plain))
    assert torch.equal(own, other)


@pytest.mark.bad_input
def test_values_of_another_dtype_are_refused_at_once():
    k, v, kd, *_ = Tokens().part(0, 30)
    store = store_of("saap")
    with pytest.raises(
        ValueError, match=r"v must be torch\.float32, as k_rope; got torch\.bfloat16"
    ):
        store.append(k, v.bfloat16(), kd)
    assert store.length == 0


@pytest.mark.bad_input
@pytest.mark.parametrize("method", ["saap", "quest", "blend"])
def test_numbers_to_truncate_may_be_tensors_and_arrays(method):
    tokens, store = Tokens(batch=2), store_of(method)
    tokens.fed(store, 700, 701)
    for dropped, left in (
        (torch.tensor([3, 5]), [698, 696]), (np.array([1, 2]), [697, 694]),
        (np.int64(4), [693, 690]), ([np.int32(1), torch.tensor(1)], [692, 689]),
    ):  # fmt: skip
        store.truncate(dropped)
        assert store.lengths == left
        assert all(type(n) is int for n in store.lengths)
    for wrong in (1.5, [1], [1, 2, 3], [0.5, 1], "12", None):
        with pytest.raises(ValueError, match="a whole number, or one for each of 2 sequences"):
            store.truncate(wrong)
    assert store.lengths == [692, 689]


@pytest.mark.parametrize("method", WITHOUT)
def test_a_store_whose_last_sequence_went_is_as_new(method):
    tokens, store, fresh = Tokens(batch=2), store_of(method), store_of(method)
    tokens.fed(store, 1300, 1301)
    store.select_sequences([])
    assert store.batch == store.length == 0
    other = Tokens(batch=3, seed=5)
    for own, expected in zip(other.fed(store, 600, 601), other.fed(fresh, 600, 601), strict=True):
        assert torch.equal(own, expected)


@pytest.mark.parametrize("method", WITHOUT)
@pytest.mark.parametrize("how", ["reset", "truncate"])
def test_nothing_of_a_text_stays_that_was_forgotten(method, how):
    tokens, store, fresh = Tokens(), store_of(method), store_of(method)
    tokens.fed(store, 1500, 1501)
    store.reset() if how == "reset" else store.truncate(1501)
    other = Tokens(seed=5)
    for n in (600, 601):
        assert torch.equal(other.fed(store, n)[0], other.fed(fresh, n)[0])
        assert store.visited_rows == fresh.visited_rows


def test_a_store_that_was_reset_takes_other_heads():
    tokens, store = Tokens(), store_of("blend")
    tokens.fed(store, 1500)
    store.reset()
    k = torch.randn(1, 3, 50, DIM)
    out, _ = store.step(k, k, k, torch.randn(1, 6, 50, DIM), torch.randn(1, 6, 50, DIM))
    assert out.shape == (1, 6, 50, DIM)


@pytest.mark.parametrize("method", REBUILT)
def test_a_step_that_is_broken_off_while_rows_join_is_asked_again(method, monkeypatch):
    tokens, store, fresh = Tokens(), store_of(method), store_of(method)
    for own in (store, fresh):
        tokens.fed(own, 1300)
    new = tokens.part(1300, 1301)
    update = type(store.selector).update

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(store.selector), "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.step(*new)
    monkeypatch.setattr(type(store.selector), "update", update)
    # Some are told of new rows before the token is there, others when it asks.
    found = store.step(*new) if store.length == 1300 else store.attend(*new[3:])
    pairs = (found, fresh.step(*new)), (tokens.fed(store, 1302), tokens.fed(fresh, 1302))
    assert store.middles == fresh.middles
    assert store.visited_rows == fresh.visited_rows < 200
    for own, other in pairs if method != "saap" else ():  # which has learned from the query twice
        assert torch.equal(own[0], other[0])


@pytest.mark.parametrize("method", [name for name in REBUILT if name != "blend"])
@pytest.mark.parametrize("kind", ["constant", "zero", "nan", "inf"])
def test_keys_that_cannot_be_searched_stop_no_other_sequence(method, kind):
    """`blend` refuses to cluster them, in `append`."""
    tokens, alone = Tokens(batch=2), store_of(method)
    if kind == "constant":
        tokens.k[1] = 1.0
    elif kind == "zero":
        tokens.k[1] = 0.0
    else:
        tokens.k[1, :, 500] = float(kind)
    store = store_of(method)
    found = tokens.fed(store, 1300, 1301)[0]
    one = Tokens(batch=2)
    one.k, one.v, one.q = one.k[:1], one.v[:1], one.q[:1]
    torch.testing.assert_close(found[:1], one.fed(alone, 1300, 1301)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["saap", "dense", "quest", "blend"])
def test_queries_that_are_views_of_their_negatives_are_read_as_they_are(method):
    tokens, store, plain = Tokens(), store_of(method), store_of(method)
    for n in (1200, 1201, 1202):
        k, v, kd, q, qd = tokens.part(store.length, n)
        own = store.step(k, v, kd, torch._neg_view(-q), torch._neg_view(-qd))
        assert torch.equal(own[0], plain.step(k, v, kd, q, qd)[0])
