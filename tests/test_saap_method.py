"""`saap`: coordinates that keys and queries share, codes as tokens come, and what is saved."""

import math
from dataclasses import replace
from unittest import mock

import pytest
import torch

import saap
from saap import hf
from saap.budget import Budget
from saap.index.coordinates import balanced
from saap.index.moments import (
    LEAST_WEIGHT,
    SHARPNESS,
    Moments,
    MomentSums,
    RecentQueries,
    Sums,
    Toward,
)
from saap.kernels.codes import coordinates_for
from saap.kv import KVStore
from saap.methods import find_method
from saap.methods import saap as saap_module
from saap.methods.saap import Saap, SaapSearch, as_coded
from saap.selector import LayerInfo

HKV, HQ, DIM = 2, 4, 16
BUDGET = Budget(max_tokens=60, n_sink=4, window=16, flush_every=16)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dim", [16, 64, 80, 128])
def test_coordinates_keep_every_inner_product(dim):
    mixing = random(1, dim, dim, seed=9)
    queries, keys = random(1, 400, dim) @ mixing, random(1, 500, dim, seed=1) @ mixing.mT + 3
    found = balanced(Moments.of(queries, keys))
    assert found.of_keys.shape == (1, 1, dim, dim)
    product = queries[0] @ found.of_queries[0, 0].T @ found.keys(keys[None])[0, 0].T
    true = queries[0] @ (keys[0] - found.mean[0, 0]).T
    assert (product - true).abs().max() < 2e-3 * float(true.abs().max())


def test_coordinates_of_keys_and_queries_are_alike_and_fall():
    scale = torch.logspace(0, -0.8, 64)
    queries, keys = random(1, 4000, 64) * scale, random(1, 5000, 64, seed=1) * scale.flip(0)
    found = balanced(Moments.of_sums(Sums.of(queries), Sums.of(keys)))
    x = found.keys(keys[None])[0, 0]
    assert x.var(0).sub(1).abs().max() < 0.1  # of unit variance
    blocks = found.importance[0, 0].unflatten(0, (8, 8)).mean(1)
    assert (blocks.diff() <= 0).all()


def test_sums_of_texts_are_the_moments_of_all():
    """A text's own queries say how much its keys count."""
    queries, keys = random(HQ, 90, DIM), random(HKV, 90, DIM, seed=1) + 1
    sums, each = MomentSums(), []
    for start in (0, 30, 60):
        part = slice(start, start + 30)
        sums.add(queries[:, part], keys[:, part])
        each.append(Moments.of(grouped(queries[:, part]), keys[:, part]))
    found = sums.moments()
    assert torch.allclose(found.queries, sum(own.queries for own in each) / 3)
    same = MomentSums()
    for _ in range(2):
        same.add(queries[:, :30], keys[:, :30])
    for name in ("queries", "keys", "mean"):
        assert torch.allclose(getattr(same.moments(), name), getattr(each[0], name))


def grouped(queries):
    return queries.unflatten(0, (HKV, -1)).flatten(1, 2)


def test_keys_that_queries_look_towards_count_more():
    keys, queries = random(HKV, 500, DIM), random(HKV, 40, DIM, seed=1)
    queries[..., 0] += 3.0
    sums = Sums.of(queries)
    toward = Toward.of(sums, Sums.of(keys))
    weights = toward.weights(keys.double())
    score = (keys.double() @ sums.mean[..., None])[..., 0]
    assert (weights.gather(1, score.argsort(1)).diff() >= 0).all()
    standard = (score - score.mean(1, keepdim=True)) / score.std(1, correction=0, keepdim=True)
    own = torch.sigmoid(SHARPNESS * standard)
    assert torch.allclose(weights, LEAST_WEIGHT + (1 - LEAST_WEIGHT) * own)
    found = Sums.of(keys, toward)
    assert torch.allclose(found.mean, (weights[..., None] * keys).sum(1) / weights.sum(1)[:, None])
    assert (found.mean[:, 0] > Sums.of(keys).mean[:, 0] + 0.3).all()


@pytest.mark.parametrize("of", ["no query", "equal keys", "one key"])
def test_where_no_key_can_be_told_from_others_all_count_alike(of):
    keys, queries = random(HKV, 50, DIM), random(HKV, 40, DIM, seed=1)
    if of == "no query":
        queries = torch.zeros_like(queries)
    elif of == "equal keys":
        keys = keys[:, :1].expand(-1, 50, -1)
    else:
        keys = keys[:, :1]
    toward = Toward.of(Sums.of(queries), Sums.of(keys))
    assert torch.allclose(
        toward.weights(keys.double()), torch.tensor((1 + LEAST_WEIGHT) / 2, dtype=torch.float64)
    )
    own = balanced(Moments.of(queries, keys))
    assert all(t.isfinite().all() for t in own.tensors().values())


def tokens(n, batch=1, seed=1):
    k, v = random(2, batch, HKV, n, DIM, seed=seed)
    return (k, v, k), random(batch, HQ, n, DIM, seed=seed + 1)


def fed(cuts, keys, q, method=None, budget=BUDGET):
    """A store that got tokens up to each cut at once, and the attention of its last token."""
    method = method or find_method("saap")()
    store, start = KVStore(method.selector(LayerInfo(DIM**-0.5)), budget), 0
    for stop in cuts:
        store.append(*(t[:, :, start:stop] for t in keys))
        found = store.attend(q[:, :, start:stop], q[:, :, start:stop])
        start = stop
    return store, found


@pytest.mark.parametrize("first", [20, 200])
def test_a_step_under_another_budget_is_what_it_is_in_a_store_of_its_own(first):
    keys, q = tokens(1201)
    store, _ = fed([1200, 1201], keys, q, budget=replace(BUDGET, max_tokens=first))
    _, expected = fed([1200, 1201], keys, q)
    latest = q[:, :, 1200:]
    found = store.attend(latest, latest, BUDGET)
    assert torch.equal(found[0], expected[0])
    assert store.visited_rows == 60 + 4 + 1201 - 4 - store.middles[0]


def true_weights(store, q):
    """What attention gives each row of the middle, added over a KV head's query heads."""
    own, n = q[0].unflatten(0, (HKV, -1)).double(), store.lengths[0]
    scores = own @ store.k[0, :, :n].double().mT * DIM**-0.5
    return scores.softmax(-1).sum(1)[:, 4 : 4 + store.middles[0]]


@pytest.mark.parametrize("dim", [0, DIM])
def test_min_weight_visits_what_attention_gives_so_much(dim):
    """Also where all keys have something in common, which coordinates leave out (`dim` is how
    many dimensions have it)."""
    keys, q = tokens(1201)
    keys[0][..., :dim] += 1.5
    keys[0][:, :, :4] += 0.4
    q = 2.5 * q + 1.0
    q[:, 3:] *= 0.1  # the last query head looks everywhere
    budget = replace(BUDGET, max_tokens=400, min_weight=0.004)
    store, _ = fed([1200, 1201], keys, q, budget=budget)
    starts, lengths = store.select(q[:, :, 1200], q[:, :, 1200])
    weights = true_weights(store, q[:, :, 1200])
    counts = lengths[0, :, 2:].sum(-1)
    assert counts.min() > 10
    assert counts.max() < 250
    for head, own in enumerate(weights):
        chosen = torch.cat(
            [
                torch.arange(s - 4, s - 4 + n)
                for s, n in zip(
                    starts[0, head, 2:].tolist(), lengths[0, head, 2:].tolist(), strict=True
                )
            ]
        )
        enough = own >= 0.004
        assert float(own[chosen].sum() / own[enough].sum()) > 0.93
        assert abs(len(chosen) - int(enough.sum())) < 0.2 * len(chosen) + 4


def test_a_layer_that_matters_more_visits_more():
    keys, q = tokens(1201)
    rows = []
    for number in (0, 1):
        budget = replace(
            BUDGET, max_tokens=400, min_weight=0.004, layer_importance=(0.5, 2.0), window=16
        )
        selector = find_method("saap")().selector(LayerInfo(DIM**-0.5, number=number))
        store = KVStore(selector, budget)
        for part in (slice(0, 1200), slice(1200, 1201)):
            store.append(*(t[:, :, part] for t in keys))
            store.attend(2 * q[:, :, part], 2 * q[:, :, part])
        rows.append(store.visited_rows)
        same = KVStore(
            find_method("saap")().selector(LayerInfo(DIM**-0.5)),
            replace(budget, layer_importance=None, min_weight=0.004 / (0.5, 2.0)[number]),
        )
        for part in (slice(0, 1200), slice(1200, 1201)):
            same.append(*(t[:, :, part] for t in keys))
            same.attend(2 * q[:, :, part], 2 * q[:, :, part])
        assert same.visited_rows == store.visited_rows
    assert rows[1] > rows[0] + 20


@pytest.mark.parametrize("share", ["group", "head"])
def test_weights_of_a_batch_are_those_of_each_alone(share):
    keys, q = tokens(1201, batch=2)
    budget = replace(BUDGET, max_tokens=400, min_weight=0.004, share=share)
    mask = torch.ones(2, 1200, dtype=torch.bool)
    mask[1, :500] = False
    method = find_method("saap")()
    store = KVStore(method.selector(LayerInfo(DIM**-0.5)), budget)
    store.append(*(t[:, :, :1200] for t in keys), mask)
    store.attend(q[:, :, :1200], q[:, :, :1200])
    store.append(*(t[:, :, 1200:] for t in keys))
    together = store.attend(q[:, :, 1200:], q[:, :, 1200:])
    for b, first in ((0, 0), (1, 500)):
        own = tuple(t[b : b + 1, :, first:] for t in keys)
        alone, found = fed(
            [1200 - first, 1201 - first], own, q[b : b + 1, :, first:], budget=budget
        )
        assert alone.visited_share < 0.5
        for got, exact in zip(together, found, strict=True):
            assert (got[b : b + 1] - exact).abs().max() < 1e-5


def test_chunks_do_not_matter():
    keys, q = tokens(900)
    stores = [
        fed(cuts, keys, q) for cuts in ([850, *range(851, 901)], [300, 850, *range(851, 901)])
    ]
    assert torch.equal(stores[0][1][0], stores[1][1][0])
    codes = [store.selector.codes for store, _ in stores]
    n = stores[0][0].middles[0]
    assert n == 880
    assert torch.equal(codes[0].fine[:, :, :n], codes[1].fine[:, :, :n])


def test_codes_of_tokens_that_came_later_are_those_of_a_new_start():
    keys, q = tokens(900)
    grown, _ = fed([600, *range(601, 901)], keys, q)
    coordinates = grown.selector.coordinates
    method = find_method("saap")()
    selector = method.selector(LayerInfo(DIM**-0.5))
    selector.trained = selector.coordinates = coordinates
    selector.least_rows = 0
    fresh = KVStore(selector, BUDGET)
    fresh.append(*(t[:, :, :899] for t in keys))
    fresh.append(*(t[:, :, 899:] for t in keys))
    found = fresh.attend(q[:, :, 899:], q[:, :, 899:])
    n = fresh.middles[0]
    assert n == grown.middles[0]
    assert torch.equal(selector.codes.fine[:, :, :n], grown.selector.codes.fine[:, :, :n])
    assert found[0].isfinite().all()


def test_a_sequence_is_coded_alike_alone_and_in_a_batch():
    each = [tokens(n, seed=n) for n in (800, 650)]
    batch = KVStore(find_method("saap")().selector(LayerInfo(DIM**-0.5)), BUDGET)
    mask = torch.arange(800) >= 800 - torch.tensor([800, 650])[:, None]

    def padded_left(t):
        return torch.nn.functional.pad(t, (0, 0, 800 - t.shape[2], 0), value=5.0)

    def both(t_of):
        return torch.cat([padded_left(t_of(pair)) for pair in each])

    batch.append(*(both(lambda pair, i=i: pair[0][i]) for i in range(3)), mask=mask)
    batch.attend(*[both(lambda pair: pair[1])] * 2)
    new, q = tokens(1, batch=2, seed=50)
    batch.append(*new)
    found = batch.attend(q, q)
    for b, (keys, queries) in enumerate(each):
        alone, _ = fed([keys[0].shape[2]], keys, queries)
        alone.append(*(t[b : b + 1] for t in new))
        own = alone.attend(q[b : b + 1], q[b : b + 1])
        assert (own[0] - found[0][b : b + 1]).abs().max() < 2e-6


def test_short_prompts_stay_dense_until_there_is_something_to_learn_from():
    keys, q = tokens(700)
    store, _ = fed([300, *range(301, 500)], keys, q)
    assert store.middles == [0]
    assert store.visited_share == 1.0
    store, _ = fed([300, *range(301, 601)], keys, q)
    assert store.middles[0] >= 512
    assert store.visited_share < 1.0


def test_beams_take_their_codes_along():
    each = [tokens(800, seed=seed) for seed in (3, 4)]
    keys = [torch.cat(parts) for parts in zip(*(pair[0] for pair in each), strict=True)]
    q = torch.cat([pair[1] for pair in each])
    store, _ = fed([799, 800], keys, q)
    store.select_sequences([1, 1])
    new, last = tokens(1, batch=2, seed=60)
    new, last = [t[:1].repeat(2, 1, 1, 1) for t in new], last[:1].repeat(2, 1, 1, 1)
    store.append(*new)
    found = store.attend(last, last)[0]
    assert torch.equal(found[0], found[1])
    alone, _ = fed([799, 800], each[1][0], each[1][1])
    alone.append(*(t[:1] for t in new))
    assert (alone.attend(last[:1], last[:1])[0] - found[:1]).abs().max() < 2e-6


def test_what_is_saved_chooses_alike():
    from saap.kv.state import restored, saved

    keys, q = tokens(800)
    store, _ = fed([799, 800], keys, q)
    header, tensors = saved(store)
    method = find_method("saap")()
    again = restored(header, tensors, method.selector(LayerInfo(DIM**-0.5)), BUDGET)
    new, last = tokens(1, seed=70)
    outs = []
    for own in (store, again):
        own.append(*new)
        outs.append(own.attend(last, last)[0])
    assert torch.equal(*outs)
    for change, message in (
        ({"fine": tensors["selector.fine"][:, :, :10]}, "fine of the codes must be"),
        (
            {"n_queries": torch.zeros(1, HKV, dtype=torch.float64)},
            "n_queries of the codes must be above 0",
        ),
        ({"query_sum": torch.zeros(1, 3)}, "query_sum of the codes must be"),
        ({"learned_from": torch.tensor([-1], dtype=torch.int32)}, "learned_from of the codes"),
    ):
        wrong = dict(tensors) | {f"selector.{name}": value for name, value in change.items()}
        with pytest.raises(ValueError, match=message):
            restored(header, wrong, method.selector(LayerInfo(DIM**-0.5)), BUDGET)


def test_a_sequence_that_has_learned_nothing_is_saved_too():
    from saap.kv.state import restored, saved

    keys, q = tokens(800, batch=2)
    store = KVStore(find_method("saap")().selector(LayerInfo(DIM**-0.5)), BUDGET)
    mask = torch.ones(2, 799, dtype=torch.bool)
    mask[1, :-30] = False
    store.append(*(t[:, :, :799] for t in keys), mask)
    store.attend(q[:, :, :799], q[:, :, :799])
    header, tensors = saved(store)
    assert header["middles"][0] > 500
    assert header["middles"][1] == 0
    again = restored(header, tensors, find_method("saap")().selector(LayerInfo(DIM**-0.5)), BUDGET)
    more, asked = tokens(700, seed=5, batch=2)
    for own in (store, again):
        own.append(*more)
        own.attend(asked, asked)
        own.settle()
    new, last = tokens(1, seed=70, batch=2)
    outs = []
    for own in (store, again):
        own.append(*new)
        outs.append(own.attend(last, last)[0])
    assert again.selector.learned_from[1] > 500
    assert outs[1].isfinite().all()
    assert torch.allclose(outs[0][0], outs[1][0], atol=1e-5)


def test_a_truncated_store_is_saved_and_read():
    """Coordinates may come from rows that are no longer there."""
    from saap.kv.state import restored, saved

    (k, v, _), q = tokens(900, seed=8)
    store = KVStore(find_method("saap")().selector(LayerInfo(DIM**-0.5)), BUDGET)
    store.append(k[:, :, :899], v[:, :, :899], k[:, :, :899])
    store.attend(q[:, :, :899], q[:, :, :899])
    step = [t[:, :, 899:] for t in (k, v, q)]
    store.append(step[0], step[1], step[0])
    store.attend(step[2], step[2])
    for dropped in (300, 400):
        store.truncate(dropped)
        header, tensors = saved(store)
        again = restored(header, tensors, find_method("saap")().selector(LayerInfo(DIM**-0.5)),
                         BUDGET)  # fmt: skip
        outs = []
        for own in (store, again):
            own.append(step[0], step[1], step[0])
            outs.append(own.attend(step[2], step[2])[0])
            own.truncate(1)
        assert torch.equal(*outs)


def test_what_is_saved_learns_alike():
    """When it has grown by half, of queries from before and after."""
    from saap.kv.state import restored, saved

    keys, q = tokens(1300)
    store, _ = fed([799, 800], keys, q)
    header, tensors = saved(store)
    again = restored(header, tensors, find_method("saap")().selector(LayerInfo(DIM**-0.5)), BUDGET)
    before = store.selector.coordinates
    for own in (store, again):
        own.append(*(t[:, :, 800:1299] for t in keys))
        own.attend(q[:, :, 800:1299], q[:, :, 800:1299])
        own.append(*(t[:, :, 1299:] for t in keys))
        own.attend(q[:, :, 1299:], q[:, :, 1299:])
    found, true = again.selector.coordinates, store.selector.coordinates
    assert not torch.allclose(true.mean, before.mean)
    for name, own in true.tensors().items():
        assert torch.allclose(found.tensors()[name], own, rtol=1e-3, atol=1e-3)


def test_drafts_teach_nothing():
    """What is asked while rows rest is forgotten with the drafts."""
    keys, q = tokens(801)
    store, _ = fed([799, 800], keys, q)
    recent = store.selector.recent[0]
    before = recent.sums.total
    with store.resting():
        store.append(*(t[:, :, 800:801] for t in keys))
        store.attend(q[:, :, 800:801], q[:, :, 800:801])
        store.truncate(1)
    assert recent.sums.total.equal(before)
    store.append(*(t[:, :, 800:801] for t in keys))
    store.attend(q[:, :, 800:801], q[:, :, 800:801])
    assert not recent.sums.total.equal(before)


def test_more_candidates_find_more():
    keys, q = tokens(1500)
    exact, _ = fed([1499], keys, q)
    scores = q[:, :, 1499].unflatten(1, (HKV, -1)) @ keys[0].mT * DIM**-0.5
    weights = scores.softmax(-1)

    def mass(search):
        store, _ = fed([1499, 1500], keys, q, find_method("saap")(search=search))
        starts, lengths = store.select(q[:, :, 1499], q[:, :, 1499])
        total = 0.0
        for h in range(HKV):
            for start, length in zip(starts[0, h].tolist(), lengths[0, h].tolist(), strict=True):
                row = store.rows.tokens[0, h, start : start + length].long()
                total += float(weights[0, h, :, row].sum())
        return total

    found = [mass(SaapSearch(width, 0)) for width in (1.0, 4.0, 100.0)]
    assert found[0] < found[1] <= found[2] + 1e-3
    assert exact.middles == [0]  # no step has asked yet


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0.5}, "width must be None or in .*; got 0.5"),
        ({"least": -1}, "least must be"),
        ({"one_of": 0}, r"one_of must be a whole number in 1\.\.2147483648; got 0"),
    ],
)
def test_bad_search(options, message):
    with pytest.raises(ValueError, match=message):
        SaapSearch(**options)


def test_only_rows_bound_it():
    selector = find_method("saap")().selector(LayerInfo(1.0))
    with pytest.raises(ValueError, match="follows max_tokens and min_weight; got nprobe=4"):
        KVStore(selector, Budget(nprobe=4))
    with pytest.raises(ValueError, match=r"needs max_tokens, .* got min_weight=0.01 alone"):
        KVStore(selector, Budget(min_weight=0.01))


def test_the_map_of_queries_is_that_of_the_coordinates():
    """Scaled as scores are, and a new one when coordinates are learned again."""
    selector = find_method("saap")().selector(LayerInfo(0.3))
    q = random(1, 2 * HKV, DIM, seed=5)
    for seed in (1, 2):
        moments = Moments.of(random(HKV, 300, DIM), random(HKV, 300, DIM, seed=seed))
        selector.coordinates = as_coded(balanced(moments))
        own = selector.coordinates.of_queries[0]
        found = selector.query_map(q)
        expected = 0.3 * (q.unflatten(1, (HKV, -1)) @ own.mT).flatten(1, 2)
        assert (found - expected).abs().max() < 0.02 * expected.abs().max()
        assert selector.query_map is selector.query_map
    assert selector.query_map.nbytes == HKV * coordinates_for(DIM) * (DIM + 4)


def turned(x, first, base=10_000.0):
    """Rows of `x [H, n, D]` with RoPE of consecutive positions put on."""
    half = x.shape[-1] // 2
    inv_freq = base ** (-torch.arange(half) / half)
    angle = (first + torch.arange(x.shape[1]))[:, None] * inv_freq
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def test_what_was_learned_is_learned_again_as_the_context_grows():
    """Later positions turn keys and queries in directions that the first ones did not have."""
    draw = torch.Generator().manual_seed(0)
    n, dim = 6000, 64
    spread = torch.linspace(2, 0.2, dim)
    mean = torch.randn(dim, generator=draw)
    k = turned(torch.randn(1, n, dim, generator=draw) * spread + mean, 0)[None]
    q = turned(torch.randn(2, n, dim, generator=draw) * spread + mean, 0)[None]
    recalls = {}
    for growth in (saap_module.GROWTH, math.inf):
        with mock.patch.object(saap_module, "GROWTH", growth):
            selector = Saap(search=SaapSearch(least=512)).selector(LayerInfo(dim**-0.5))
            store = KVStore(selector, Budget(max_tokens=150, n_sink=4, window=32))
            for first in range(0, n, 600):
                piece = slice(first, first + 600)
                store.append(k[:, :, piece], k[:, :, piece], k[:, :, piece])
                selector.observe(q[:, :, piece], [600])
                store.settle()
            found = []
            for last in range(-40, 0):
                asked = q[:, :, last]
                starts, lengths = store.select(
                    asked, asked, store.budget, positions=torch.tensor([n])
                )
                weights = (asked[0] @ k[0, 0, 4:-32].T * dim**-0.5).softmax(-1).sum(0)
                rows = [
                    row - 4
                    for s, m in zip(
                        starts[0, 0, 2:].tolist(), lengths[0, 0, 2:].tolist(), strict=True
                    )
                    for row in range(s, s + m)
                ]
                found.append(float(weights[rows].sum() / weights.topk(len(rows)).values.sum()))
        recalls[growth] = sum(found) / len(found)
    assert recalls[saap_module.GROWTH] > recalls[math.inf] + 0.15


def test_no_more_queries_are_kept_than_are_learned_from():
    selector = find_method("saap")().selector(LayerInfo(0.125))
    for size in (1500, 3000, 700, 700, 1, 1, 5000, 600):
        selector.observe(random(1, 2, size, 16), [size])
    (own,) = selector.observed.values()
    sizes = [t.shape[1] for t in own]
    assert sizes == [2048, 600]
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in own)


@pytest.mark.parametrize("asked", [(), (1, 5, 20, 64, 65)])
def test_queries_are_counted_by_age_as_they_were_when_they_came(asked):
    """A decoder may use one tensor for the queries of all its steps. Who asks changes nothing."""
    count = RecentQueries.WAITING + 3
    came = random(4, count, 16)
    by_one, buffer = RecentQueries(2), torch.empty(4, 1, 16)
    for i in range(count):
        by_one.add(buffer.copy_(came[:, i : i + 1]))
        if i in asked:
            by_one.copy().add(came[:, :7])
            by_one.sums.mean.add_(1)
    age = torch.arange(count - 1, -1, -1, dtype=torch.float64)
    weights = (1 - 1 / 2048) ** age[:, None]
    heads = came.double().unflatten(0, (2, 2))
    expected = (
        (weights.sum() * 2).expand(2),
        (heads * weights).sum((1, 2)),
        torch.einsum("hgni,hgnj->hij", heads * weights, heads),
    )
    for own, other in zip(by_one.sums.parts, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)


def test_first_queries_that_come_in_parts_count_as_if_they_had_come_together():
    came = random(4, 3000, 16)
    for cut in (0, 700, 2900):
        in_parts, together = RecentQueries(2), RecentQueries(2)
        together.begin(came[:, : cut + 100])
        if cut:
            in_parts.begin(came[:, :cut])
        in_parts.begin(came[:, cut : cut + 100])
        counts = [own.sums.count for own in (in_parts, together)]
        torch.testing.assert_close(*counts)
        if cut < 2000:  # else some of the first are left out
            for own, other in zip(in_parts.sums.parts, together.sums.parts, strict=True):
                torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_a_cache_that_was_reset_is_as_a_new_one(tiny_model):
    """What it learned from other text goes with that text."""
    texts = torch.randint(1, 96, (2, 700), generator=torch.Generator().manual_seed(4))
    found = []
    with saap.attached(tiny_model, budget=saap.Budget(max_tokens=32)) as saap_model:
        for first in (None, texts[1]):
            cache = saap_model.cache()
            if first is not None:
                tiny_model(first[None] // 3, **hf.over(cache))
                tiny_model(first[None, :1], **hf.over(cache))
                cache.reset()
            tiny_model(texts[:1], **hf.over(cache))
            steps = [tiny_model(texts[:1, n : n + 1], **hf.over(cache)) for n in range(3)]
            assert cache.visited_share < 0.2
            found.append(torch.cat([step.logits for step in steps]))
    assert torch.equal(*found)


@torch.no_grad()
@pytest.mark.parametrize("first", [60, 690])
@pytest.mark.parametrize("crop", [False, True])
def test_queries_of_forgotten_tokens_are_not_learned_from(tiny_model, first, crop):
    """Also where no step has come to learn from them."""
    texts = torch.randint(1, 96, (2, 700), generator=torch.Generator().manual_seed(4))
    found = []
    with saap.attached(tiny_model, budget=saap.Budget(max_tokens=32)) as saap_model:
        for before in (0, first):
            cache = saap_model.cache()
            if before:
                tiny_model(texts[1:, :before] // 3, **hf.over(cache))
                cache.crop(-before) if crop else cache.reset()
            tiny_model(texts[:1], **hf.over(cache))
            found.append(tiny_model(texts[:1, :1], **hf.over(cache)).logits)
            assert cache.visited_share < 0.2
    assert torch.equal(*found)


@torch.no_grad()
def test_a_cache_that_was_reset_takes_another_batch(tiny_model):
    texts = torch.randint(1, 96, (3, 700), generator=torch.Generator().manual_seed(4))
    with saap.attached(tiny_model, budget=saap.Budget(max_tokens=32)) as saap_model:
        cache = saap_model.cache()
        for batch in (1, 3, 2):
            fresh = saap_model.cache()
            for own in (cache, fresh):
                tiny_model(texts[:batch], **hf.over(own))
            step = texts[:batch, :1]
            found = [tiny_model(step, **hf.over(own)).logits for own in (cache, fresh)]
            assert torch.equal(*found)
            cache.reset()
            assert cache.lengths == []
            assert sum(layer.store.rows.nbytes for layer in cache.saap_layers) == 0
