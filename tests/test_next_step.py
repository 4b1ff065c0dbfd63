"""Steps that are like the ones before them: `KVStore.again` gives, to the bit, what `append` and
`attend` give, refuses where it would not, and leaves the same store."""

import copy
import random
from dataclasses import replace

import pytest
import torch

from saap.budget import Budget
from saap.hf import over
from saap.kv import KVStore
from saap.kv.next_step import NextStep
from saap.methods import find_method
from saap.selector import LayerInfo

from .torch_threads import torch_threads

pytestmark = pytest.mark.many_steps

HKV, HQ, DIM, SINKS, WINDOW = 2, 4, 64, 4, 16
LAYER = LayerInfo(sm_scale=DIM**-0.5)
BUDGETS = {
    "rows": Budget(max_tokens=40, n_sink=SINKS, window=WINDOW, flush_every=16),
    "weight": Budget(
        max_tokens=40, min_weight=1e-3, n_sink=SINKS, window=WINDOW, flush_every=16
    ),
    "head": Budget(
        max_tokens=24, n_sink=SINKS, window=WINDOW, flush_every=16, share="head"
    ),
    "dense below": Budget(
        max_tokens=40, n_sink=SINKS, window=WINDOW, flush_every=16, dense_below=720
    ),
}  # fmt: skip


def store_of(budget, method="saap", **options):
    selector = None if method == "dense" else find_method(method)().selector(LAYER)
    return KVStore(selector, budget, **options)


def tokens(batch, n, seed):
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, batch, HKV, n, DIM, generator=generator)
    return k, v, torch.randn(batch, HQ, n, DIM, generator=generator)


def begun(store, batch, n, seed=0, mask=None):
    k, v, q = tokens(batch, n, seed)
    store.append(k, v, k, mask)
    store.attend(q, q)


def general(store, k, v, q):
    store.append(k, v, k)
    return store.attend(q, q)


def lean(store, k, v, q):
    """The step, and whether it was like the one before."""
    found = store.again(q, k, v)
    return (general(store, k, v, q), False) if found is None else (found, True)


def assert_the_same_to_the_bit(method, budget, batch, padding, kv_dtype=None):
    n = 700
    mask = torch.ones(batch, n, dtype=torch.bool)
    mask[0, :padding] = False
    stores = [store_of(BUDGETS[budget], method, kv_dtype=kv_dtype) for _ in range(2)]
    for store in stores:
        begun(store, batch, n, mask=mask)
    n_lean = 0
    for i in range(60):
        k, v, q = tokens(batch, 1, 10 + i)
        (out, lse), was_lean = lean(stores[0], k, v, q)
        expected = general(stores[1], k, v, q)
        assert torch.equal(out, expected[0]), i
        assert torch.equal(lse, expected[1]), i
        n_lean += was_lean
        assert stores[0].lengths == stores[1].lengths
        assert stores[0].middles == stores[1].middles
        assert stores[0].visited_share == stores[1].visited_share
        assert stores[0].bytes_read == stores[1].bytes_read
    assert n_lean >= (40 if padding == 0 or batch == 1 else 30)  # but for flushes and those after
    held = max(stores[0].lengths)
    for name in ("k", "v"):
        mine, other = (getattr(store, name)[:, :, :held] for store in stores)
        assert all(
            torch.equal(mine[b, :, :n], other[b, :, :n]) for b, n in enumerate(stores[0].lengths)
        )


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("method", ["saap", "dense"])
def test_the_same_to_the_bit(method, budget, batch, padding):
    assert_the_same_to_the_bit(method, budget, batch, padding)


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("budget", ["rows", "weight"])
def test_the_same_to_the_bit_over_narrow_rows(budget, kv_dtype):
    assert_the_same_to_the_bit("saap", budget, 3, 5, kv_dtype)


def test_what_a_narrow_row_cannot_hold_is_refused():
    store = store_of(BUDGETS["rows"], kv_dtype=torch.float16, capacity=2000)
    begun(store, 1, 700)
    for i in range(3):
        general(store, *tokens(1, 1, i))
    k, v, q = tokens(1, 1, 50)
    assert store.again(q, k, v) is not None
    for wrong in ((q, k * 1e6, v), (q, k, v * 1e6)):
        with pytest.raises(ValueError, match=r"must be within 65504 for kv_dtype torch.float16"):
            store.again(*wrong)
    assert store.length == 704
    assert store.again(q, k, v) is not None


@pytest.mark.parametrize("seed", range(8))
def test_whatever_happens_between_steps(seed):
    """Flushes, truncation, other budgets, drafts, sequences that change places, chunks, growth."""
    draw = random.Random(seed)
    names = list(BUDGETS)
    batch = draw.choice([1, 2])
    budget = BUDGETS[draw.choice(names)]
    kv_dtype = torch.int8 if seed > 5 else None
    stores = [
        store_of(budget, capacity=draw.choice([0, 2000]), kv_dtype=kv_dtype) for _ in range(2)
    ]
    for store in stores:
        begun(store, batch, 640)
    n_lean = 0
    for i in range(150):
        event = draw.random()
        if event < 0.03:
            n = draw.randrange(1, 60)
            for store in stores:
                store.truncate(n)
        elif event < 0.06:
            chosen = [draw.randrange(batch) for _ in range(batch)]
            for store in stores:
                store.select_sequences(chosen)
        elif event < 0.09:
            other = BUDGETS[draw.choice(names)]
            for store in stores:
                store.budget = other
        elif event < 0.12:
            n = draw.choice([2, 30])
            for store in stores:
                begun(store, batch, n, i)
        elif event < 0.14:
            for store in stores:
                store.settle()
        elif event < 0.18:  # somebody looks, under another budget
            other = replace(stores[0].budget, dense_below=draw.choice([0, 10**6]))
            q = tokens(batch, 1, i)[2][:, :, 0]
            for store in stores[: draw.choice([1, 2])]:
                store.select(q, q, other)
        elif event < 0.20:
            for store in stores:
                store.reserve(store.length + 200)
        elif event < 0.22:
            stores = [copy.deepcopy(store) for store in stores]
        elif event < 0.25:
            with stores[0].resting(), stores[1].resting():
                for j in range(5):
                    step = tokens(batch, 1, 5000 + 10 * i + j)
                    (out, lse), _ = lean(stores[0], *step)
                    expected = general(stores[1], *step)
                    assert torch.equal(out, expected[0])
                    assert torch.equal(lse, expected[1])
            for store in stores:
                store.truncate(5)
        step = tokens(batch, 1, 1000 + i)
        (out, lse), was_lean = lean(stores[0], *step)
        expected = general(stores[1], *step)
        assert torch.equal(out, expected[0]), (seed, i)
        assert torch.equal(lse, expected[1]), (seed, i)
        n_lean += was_lean
    assert n_lean > 60


def test_a_step_that_is_not_like_the_last_is_refused():
    store = store_of(BUDGETS["rows"], capacity=2000)
    begun(store, 1, 700)
    k, v, q = tokens(1, 1, 1)
    assert store.again(q, k, v) is None  # none before it
    for _ in range(3):
        general(store, k, v, q)
    assert store.again(q, k, v) is not None
    held = store.length
    assert store.again(q, k, v, sm_scale=0.5) is None
    assert store.again(q, k, v, softcap=3.0) is None
    assert store.again(q.double(), k, v) is None
    assert store.again(q, k.half(), v) is None
    assert store.again(q[:, :2], k, v) is None
    assert store.again(*(torch.cat([t, t]) for t in (q, k, v))) is None
    assert store.again(q, k.requires_grad_(), v) is None
    with torch_threads(torch.get_num_threads() + 1):
        assert store.again(q, k.detach(), v) is None
    assert store.length == held
    store.budget = BUDGETS["weight"]
    assert store.again(q, k.detach(), v) is None
    store.budget = BUDGETS["rows"]
    assert store.again(q, k.detach(), v) is not None
    with store.resting():  # a draft is not observed
        assert store.again(q, k.detach(), v) is None


def test_step_is_append_and_attend():
    stores = [store_of(BUDGETS["rows"]) for _ in range(2)]
    for store in stores:
        begun(store, 1, 700)
    for i in range(20):
        k, v, q = tokens(1, 1, i)
        found = stores[0].step(k, v, k, q, q, sm_scale=0.1)
        stores[1].append(k, v, k)
        expected = stores[1].attend(q, q, sm_scale=0.1)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("broken", ["write", "choose", "attend"])
@pytest.mark.parametrize("budget", ["rows", "weight"])
def test_a_step_that_is_broken_off_has_not_been(budget, broken, monkeypatch):
    stores = [store_of(BUDGETS[budget], capacity=2000) for _ in range(2)]
    for store in stores:
        begun(store, 1, 700)
        for i in range(3):
            general(store, *tokens(1, 1, i))

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(NextStep, broken, interrupted)
        k, v, q = tokens(1, 1, 50)
        with pytest.raises(KeyboardInterrupt):
            stores[0].again(q, k, v)
    assert stores[0].lengths == stores[1].lengths
    for i in range(30):
        step = tokens(1, 1, 100 + i)
        (out, lse), _ = lean(stores[0], *step)
        expected = general(stores[1], *step)
        assert torch.equal(out, expected[0]), i
        assert torch.equal(lse, expected[1]), i


def test_a_look_under_another_budget_between_steps():
    """One sequence is visited whole under it, and its ranges are written over for that."""
    stores = [store_of(BUDGETS["rows"], capacity=2000) for _ in range(2)]
    mask = torch.arange(700) >= torch.tensor([40, 0])[:, None]
    for store in stores:
        begun(store, 2, 700, mask=mask)
    for i in range(30):
        if i % 6 == 5:
            look = replace(BUDGETS["rows"], dense_below=min(stores[0].lengths) + 1)
            q = tokens(2, 1, i)[2][:, :, 0]
            stores[0].select(q, q, look)
        step = tokens(2, 1, 100 + i)
        (out, lse), _ = lean(stores[0], *step)
        expected = general(stores[1], *step)
        assert torch.equal(out, expected[0]), i
        assert torch.equal(lse, expected[1]), i


def test_methods_without_it_go_the_general_way():
    store = store_of(BUDGETS["rows"], "quest")
    begun(store, 1, 700)
    for i in range(4):
        k, v, q = tokens(1, 1, i)
        assert store.again(q, k, v) is None
        general(store, k, v, q)


def test_generate_takes_it(monkeypatch):
    import saap

    from .test_generate import generated, make, prompt

    model = make("llama")
    budget = Budget(max_tokens=24, n_sink=4, window=8, flush_every=8)
    taken = []
    again = KVStore.again

    def counted(self, *arguments, **options):
        found = again(self, *arguments, **options)
        taken.append(found is not None)
        return found

    answers = {}
    for lean_steps in (True, False):
        monkeypatch.setattr(KVStore, "again", counted if lean_steps else lambda *_, **__: None)
        with saap.attached(model, None, budget, method="saap") as saap_model:
            answers[lean_steps] = generated(
                model, {"input_ids": prompt(2, 600)}, max_new_tokens=24,
                **over(saap_model.cache()),
            )  # fmt: skip
    assert torch.equal(answers[True], answers[False])
    assert sum(taken) >= len(taken) / 2
