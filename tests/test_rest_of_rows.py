"""What a store knows of the rows that steps leave out, whatever way it came to them."""

import copy
import dataclasses

import pytest
import torch

import saap
from saap.budget import Budget
from saap.distributed.rest import put_sample
from saap.hf import over
from saap.index.rows import BucketRows
from saap.kv import KVStore
from saap.kv.rest import RestOfRows, clustered, counted, sample_step
from saap.kv.row_sums import N_CLUSTERS, Clusters, RowSums, membership
from saap.methods import find_method
from saap.methods.saap import SaapSelector
from saap.methods.snapshot import Snapshot
from saap.selector import LayerInfo
from tests.conftest import random_model

HKV, HQ, DIM = 2, 4, 16
LAYER = LayerInfo(sm_scale=DIM**-0.5)
BUDGET = Budget(max_tokens=40, n_sink=4, window=16, flush_every=8)
WITHOUT = dataclasses.replace(BUDGET, estimate_rest=False)
METHODS = ("saap", "oracle-tokens", "flat", "pq")


def drawn(n, batch=1, seed=0):
    """Keys, values and queries `[batch, H, n, DIM]`, values correlated with keys."""
    rng = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, batch, HKV, n, DIM, generator=rng)
    q = torch.randn(batch, HQ, n, DIM, generator=rng)
    mix = torch.randn(DIM, DIM, generator=rng)
    return k + 0.3, v + 0.3 * k @ mix, 1.5 * q


def store_of(method="saap", budget=BUDGET, **options):
    return KVStore(find_method(method)().selector(LAYER), budget, **options)


def read(store, tensors, cuts, start=0):
    k, v, q = tensors
    for stop in cuts:
        part = slice(start, stop)
        store.append(k[:, :, part], v[:, :, part], k[:, :, part])
        found = store.attend(q[:, :, part], q[:, :, part])
        start = stop
    return found


def exact(tensors, n):
    k, v, q = (t.double() for t in tensors)
    own = q[:, :, n - 1].unflatten(1, (HKV, -1))
    scores = torch.einsum("bhgd,bhnd->bhgn", own, k[:, :, :n]) * LAYER.sm_scale
    out = torch.einsum("bhgn,bhnd->bhgd", scores.softmax(-1), v[:, :, :n])
    return out.flatten(1, 2), scores.logsumexp(-1).flatten(1, 2)


def error(found, tensors, n):
    true = exact(tensors, n)[0]
    return float((found[0][:, :, 0] - true).norm() / true.norm())


def middle_of(store, b=0):
    """Keys beside values of the rows of the middle that count, float64."""
    last = 4 + counted(store.middles[b])
    return torch.cat([t[b, :, 4:last] for t in (store.k, store.v)], -1).double()


def moments_of(rows):
    """Covariances of these rows with their keys, and means, directly."""
    mean = rows.mean(1, keepdim=True)
    return (rows - mean)[..., :DIM].mT @ (rows - mean) / rows.shape[1], mean[:, 0]


def told(store, b=0):
    """What the estimate knows: the covariances within clusters and between them, and the means."""
    found = {name: t[b].double() for name, t in vars(store.estimated).items()}
    share = found["sizes"][:, :1]
    between = (found["keys"] * share) @ torch.cat([found["keys"].mT, found["values"]], -1)
    return found["spread"] + between, found["means"]


def assert_counted(store, b=0):
    spread, means = moments_of(middle_of(store, b))
    found_spread, found_means = told(store, b)
    torch.testing.assert_close(found_means, means, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found_spread, spread, rtol=2**-7, atol=2e-3)
    assert int(store.estimated.n_rows[b]) == store.middles[b]


@pytest.mark.parametrize("method", METHODS)
def test_the_estimate_brings_attention_nearer(method):
    tensors = drawn(1200)
    found = {b: read(store_of(method, b), tensors, [1199, 1200]) for b in (BUDGET, WITHOUT)}
    with_rest, without = (error(found[b], tensors, 1200) for b in (BUDGET, WITHOUT))
    assert with_rest < 0.6 * without
    true = exact(tensors, 1200)[1]
    far = [float((found[b][1][:, :, 0] - true).abs().max()) for b in (BUDGET, WITHOUT)]
    assert far[0] < 0.5 * far[1]


@pytest.mark.parametrize(("method", "most"), [("saap", 0.03), ("oracle-tokens", 1e-5)])
@pytest.mark.parametrize("share", ["group", "head"])
@pytest.mark.parametrize("batch", [1, 2])
def test_rows_that_were_scored_count_as_they_are(method, most, share, batch, monkeypatch):
    """Keys are not normal here: a few of them are much like the query. Codes are of all rows, so
    that what the rest holds is known but for their errors, step for step."""
    budget = dataclasses.replace(BUDGET, share=share)
    tensors = k, _, q = drawn(900, batch)
    k[:, :, ::7] += 2.0 * q[:, ::2, -1:]

    def far(cuts):
        found = read(store_of(method, budget), tensors, cuts)
        return float((found[1][:, :, 0] - exact(tensors, 900)[1]).abs().max())

    for cuts in ([899, 900], [700, *range(880, 901)]):
        assert far(cuts) < most
    for selector in (SaapSelector, Snapshot):
        monkeypatch.setattr(selector, "_left_out", lambda *_: None)
    assert far([899, 900]) > 0.1


@pytest.mark.parametrize("one_by_one", [False, True])
def test_scores_of_another_scale_say_nothing(one_by_one, monkeypatch):
    tensors, found = drawn(900), []
    for _ in range(2):
        store = store_of()
        k, v, q = tensors
        for part in (slice(0, 890), *(slice(i, i + 1) for i in range(890, 900))):
            store.append(k[:, :, part], v[:, :, part], k[:, :, part])
            scale = 0.7 * LAYER.sm_scale if one_by_one or part.stop == 900 else None
            last = store.attend(q[:, :, part], q[:, :, part], sm_scale=scale)
        found.append(last)
        monkeypatch.setattr(SaapSelector, "_left_out", lambda *_: None)
    assert all(map(torch.equal, *found))


def test_nearly_all_rows_are_counted_and_seldom_others():
    before, changes = 0, 0
    for n in range(20_000):
        now = counted(n)
        assert before <= now <= n
        assert n - now <= n // 32
        assert n >= 64 or now == n
        changes += now != before
        before = now
    assert changes < 500


def test_clusters_are_found_anew_as_the_rows_grow():
    before, changes = 0, 0
    for n in range(1, 20_000):
        now = clustered(n)
        assert before <= now <= n
        assert now > 0.8 * n
        changes += n > 1000 and now != before
        before = now
    assert changes < 20


@pytest.mark.parametrize("cuts", [(5000,), (1, 2501), (2500, 1, 999), (3000, 4000)])
def test_ranks_draw_the_sample_of_one_process(cuts):
    k, v = torch.randn(2, 1, HKV, 8000, DIM, generator=torch.Generator().manual_seed(0))

    def rest_of(first, n):
        rows = BucketRows(("k", "v"))
        rows.vectors = {name: t[:, :, first : first + n] for name, t in (("k", k), ("v", v))}
        return RestOfRows(rows, 0)

    last = clustered(counted(8000))
    step = sample_step(last)
    assert step > 1
    expected = rest_of(0, 8000).every(0, 0, last, step)
    found, before = torch.zeros_like(expected), 0
    for held in (*cuts, 8000 - sum(cuts)):
        rank = torch.zeros_like(expected)
        put_sample(rank, rest_of(before, held), last, before, held)
        found, before = found + rank, before + held
    assert torch.equal(found, expected)


def test_sums_of_clusters():
    """Each row in that of its nearest centroid; all that is said follows from the rows."""
    rng = torch.Generator().manual_seed(0)
    centers = 4 * torch.randn(HKV, 6, 2 * DIM, generator=rng)
    number = torch.randint(0, 6, (3000,), generator=rng)
    size = torch.linspace(0.2, 0.6, 6)[number, None]
    rows = centers[:, number] + size * torch.randn(HKV, 3000, 2 * DIM, generator=rng)
    clusters = Clusters.of(rows[:, ::2])
    sums = RowSums(clusters)
    for part in rows.split(1100, 1):
        sums.add(part)
    keys = (rows - clusters.origin)[..., :DIM]
    own = torch.cdist(keys, clusters.centroids).argmin(-1)
    assert torch.equal(membership(keys, clusters.centroids).argmax(-1), own)
    alike = clusters.centroids[:, :1].expand(-1, 3, -1)
    assert torch.equal(membership(keys, alike), torch.full((HKV, 3000, 3), 1 / 3))
    found = sums.moments()
    rows = rows.double()
    for head in range(HKV):
        within = torch.zeros(DIM, 2 * DIM, dtype=torch.float64)
        spreads = torch.zeros(N_CLUSTERS, dtype=torch.float64)
        for c in range(N_CLUSTERS):
            mine = rows[head, own[head] == c]
            share = float(found["sizes"][head, 0, c])
            assert share == pytest.approx(len(mine) / 3000)
            if len(mine):
                mean = mine.mean(0)
                told = torch.cat([found["keys"][head, :, c], found["values"][head, c]])
                torch.testing.assert_close(found["means"][head] + told, mean, rtol=1e-5, atol=1e-5)
                off = mine - mean
                within += off[:, :DIM].mT @ off / 3000
                spreads[c] = off[:, :DIM].square().sum() / len(mine)
        torch.testing.assert_close(found["spread"][head], within, rtol=1e-4, atol=1e-5)
        share = found["sizes"][head, 0]
        expected = torch.where(share > 0, spreads / (share * spreads).sum(), 0.0)
        torch.testing.assert_close(found["sizes"][head, 1] * (share > 0), expected, rtol=1e-3,
                                   atol=1e-4)  # fmt: skip
        labels = own[head]
        purity = sum(int(number[labels == c].bincount().max()) for c in labels.unique()) / 3000
        assert purity > 0.99


@pytest.mark.parametrize("cuts", [[900], [899, 900], [300, 301, 700, 900]])
def test_moments_are_those_of_the_rows(cuts):
    tensors = drawn(1000)
    store = store_of()
    read(store, tensors, [*cuts, *range(901, 960)])
    assert_counted(store)
    alone = store_of()
    read(alone, tensors, [959, 960] if cuts == [900] else [958, 959, 960])
    assert_counted(alone)


@pytest.mark.parametrize("cuts", [[300, 301, 959, 960], [700, 701, 959, 960], range(500, 961)])
def test_clusters_depend_on_the_rows_and_not_on_how_they_came(cuts):
    tensors = drawn(960)
    grown, at_once = store_of(), store_of()
    read(grown, tensors, cuts)
    read(at_once, tensors, [959, 960])
    for name, found in vars(grown.estimated).items():
        expected = getattr(at_once.estimated, name).double()
        torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=1e-4)


def test_steps_like_the_one_before_are_the_same():
    tensors = drawn(1000)
    k, v, q = tensors
    store, twin = store_of(), store_of()
    for own in (store, twin):
        read(own, tensors, [900, 901, 902])
    for n in range(902, 960):
        new = slice(n, n + 1)
        given = k[:, :, new], v[:, :, new], k[:, :, new], q[:, :, new], q[:, :, new]
        found = store.step(*given)
        twin.append(*given[:3])
        for a, b in zip(found, twin.attend(*given[3:]), strict=True):
            assert torch.equal(a, b)
    assert_counted(store)


def test_a_sequence_is_the_same_in_a_batch():
    tensors = drawn(700, batch=3)
    together = read(store_of(), tensors, [699, 700])
    for b in range(3):
        alone = read(store_of(), tuple(t[b : b + 1] for t in tensors), [699, 700])
        for a, t in zip(alone, together, strict=True):
            torch.testing.assert_close(a[0], t[b], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("left", [690, 500, 300])
def test_truncated_rows_are_forgotten(left, at_once):
    tensors, other = drawn(900), drawn(900, seed=5)
    store = store_of()
    read(store, tensors, [700, 701])
    store.truncate(701 - left)
    mixed = tuple(torch.cat([t[:, :, :left], o[:, :, left:]], 2)
                  for t, o in zip(tensors, other, strict=True))  # fmt: skip
    read(store, mixed, [758, 759] if at_once else range(left + 1, 760), start=left)
    assert_counted(store)


def test_sequences_change_places():
    tensors = drawn(720, batch=2)
    store = store_of()
    read(store, tensors, [700, 701])
    store.select_sequences([1, 0, 1])
    order = tuple(t[[1, 0, 1]] for t in tensors)
    read(store, order, [702, 710, 711], start=701)
    for b in range(3):
        assert_counted(store, b)


def test_a_short_sequence_changes_places_with_a_long_one():
    """Nothing was summed up of the last one."""
    k, v, q = drawn(720, batch=2)
    store = store_of()
    mask = torch.arange(700) >= torch.tensor([0, 690])[:, None]
    store.append(k[:, :, :700], v[:, :, :700], k[:, :, :700], mask)
    store.attend(q[:, :, :700], q[:, :, :700])
    for n in range(700, 720):
        own = slice(n, n + 1)
        rows = k[:, :, own], v[:, :, own], k[:, :, own]
        found = store.step(*rows, q[:, :, own], q[:, :, own])
        if n < 719:
            assert store.estimated is not None
            store.select_sequences([1, 0])
            k, v, q = (t.flip(0) for t in (k, v, q))
    assert all(bool(t.isfinite().all()) for t in found)
    assert_counted(store, 1)


def test_nothing_is_added_where_all_is_visited():
    tensors = drawn(800)
    every = dataclasses.replace(BUDGET, max_tokens=10_000)
    below = dataclasses.replace(BUDGET, dense_below=5000)
    for budget in (every, below):
        found = read(store_of(budget=budget), tensors, [799, 800])
        true = exact(tensors, 800)
        assert error(found, tensors, 800) < 1e-5
        assert (found[1][:, :, 0] - true[1]).abs().max() < 1e-5


def test_a_short_sequence_beside_a_long_one_is_visited_whole():
    tensors = drawn(900, batch=2)
    k, v, q = tensors
    mask = torch.ones(2, 899, dtype=torch.bool)
    mask[1, :300] = False  # 599 tokens
    store = store_of(budget=dataclasses.replace(BUDGET, dense_below=700))
    first = slice(0, 899)
    store.append(k[:, :, first], v[:, :, first], k[:, :, first], mask)
    store.attend(q[:, :, first], q[:, :, first])
    last = slice(899, 900)
    store.append(k[:, :, last], v[:, :, last], k[:, :, last])
    found = store.attend(q[:, :, last], q[:, :, last])
    assert store.estimated.n_rows.tolist() == [store.middles[0], 0]
    short = tuple(t[1:, :, 300:] for t in tensors)
    torch.testing.assert_close(
        found[0][1:, :, 0].double(), exact(short, 600)[0], rtol=1e-5, atol=1e-5
    )


def test_single_keys_far_from_all_others_do_not_count():
    """They would make the scores' variance many times what it is for the rest."""
    k, v, q = drawn(1200)
    k[:, :, [300, 700, 1000]] *= 40
    tensors = k, v, q
    store = store_of()
    found = read(store, tensors, [1199, 1200])
    without = read(store_of(budget=WITHOUT), tensors, [1199, 1200])
    last = 4 + counted(store.middles[0])
    near = torch.tensor([n not in (300, 700, 1000) for n in range(4, last)])
    spread, means = moments_of(torch.cat([k, v], -1)[0, :, 4:last][:, near].double())
    found_spread, found_means = told(store)
    torch.testing.assert_close(found_spread, spread, rtol=2**-7, atol=2e-3)
    torch.testing.assert_close(found_means, means, rtol=1e-4, atol=1e-5)
    assert error(found, tensors, 1200) < 1.05 * error(without, tensors, 1200)


def test_keys_that_are_all_alike():
    k, v, q = drawn(800)
    k[:] = 0.5
    tensors = k, v, q
    found = read(store_of(), tensors, [799, 800])
    without = read(store_of(budget=WITHOUT), tensors, [799, 800])
    assert error(found, tensors, 800) < 0.3 * error(without, tensors, 800)


@pytest.mark.parametrize("method", ["streaming", "quest", "kmeans-online"])
def test_only_methods_that_visit_the_best_rows(method):
    store = store_of(method)
    read(store, drawn(800), [799, 800])
    assert store.estimated is None


def test_capped_scores_are_not_estimated():
    store, tensors = store_of(), drawn(800)
    read(store, tensors, [799])
    k, v, q = (t[:, :, 799:] for t in tensors)
    store.append(k, v, k)
    store.attend(q, q, softcap=20.0)
    assert store.estimated is None


def test_by_weight():
    tensors = drawn(1200)
    by_weight = dataclasses.replace(BUDGET, max_tokens=400, min_weight=0.01)
    found = {}
    for estimate in (True, False):
        budget = dataclasses.replace(by_weight, estimate_rest=estimate)
        found[estimate] = error(
            read(store_of(budget=budget), tensors, [1198, 1199, 1200]), tensors, 1200
        )
    assert found[True] < 0.6 * found[False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_rows_of_few_bits(dtype):
    tensors = drawn(900)
    found = read(store_of(kv_dtype=dtype), tensors, [899, 900])
    without = read(store_of(budget=WITHOUT, kv_dtype=dtype), tensors, [899, 900])
    assert error(found, tensors, 900) < 0.7 * error(without, tensors, 900)


def test_bytes_are_told():
    tensors = drawn(800)
    store, without = store_of(), store_of(budget=WITHOUT)
    for own in (store, without):
        read(own, tensors, [799, 800])
    clusters = N_CLUSTERS
    moments = HKV * (2 * 2 * DIM * (DIM + clusters) + 4 * (2 * DIM + 2 * clusters))
    assert store.bytes_read - without.bytes_read == moments
    sums = 8 * (DIM * 2 * DIM + clusters * (2 * DIM + 2)) + 4 * (2 * DIM + clusters * DIM + 1)
    left_out = 4 * HQ  # what the choice tells of other rows
    assert store.nbytes - without.nbytes == moments + 4 + HKV * sums + left_out


def test_a_copy_goes_its_own_way():
    tensors = drawn(800)
    store = store_of()
    read(store, tensors, [700, 701])
    twin = copy.deepcopy(store)
    read(store, tensors, range(702, 760), start=701)
    assert_counted(store)
    read(twin, drawn(800, seed=3), range(702, 790), start=701)
    assert_counted(twin)
    assert_counted(store)


@pytest.mark.parametrize("in_file", [False, True])
def test_saved_and_opened(tmp_path, in_file):
    model, budget = random_model("llama"), dataclasses.replace(BUDGET, max_tokens=64)
    tokens = torch.randint(1, 96, (1, 760), generator=torch.Generator().manual_seed(7))
    with saap.attached(model, budget=budget) as attached, torch.no_grad():
        cache = attached.cache(directory=tmp_path / "rows" if in_file else None)
        for part in (tokens[:, :700], tokens[:, 700:701]):
            model(part, **over(cache))
        path = tmp_path / ("rows" if in_file else "context.safetensors")
        attached.save_context(cache, tokens[0, :701], path)
        if in_file:
            cache.close()
        opened, _ = attached.open_context(path)
        other = attached.cache()
        for part in (tokens[:, :700], tokens[:, 700:701]):
            model(part, **over(other))
        for own in (opened, other):
            own.logits = [model(t, **over(own)).logits for t in tokens[:, 701:].split(1, 1)]
        for a, b in zip(opened.logits, other.logits, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert opened.saap_layers[0].store.estimated is not None


def test_steps_after_saving_know_the_rows_that_joined_before_it():
    tensors = drawn(900)
    store = store_of()
    read(store, tensors, [700, 701, 740])
    store.settle()
    assert store.rest.state(store.middles)["counts"][0, 0].sum() > store.estimated.n_rows[0]
    read(store, tensors, [741], start=740)
    assert_counted(store)


@pytest.mark.bad_input
def test_a_saved_rest_that_does_not_fit():
    store = store_of()
    read(store, drawn(800), [799, 800])
    store.settle()
    state, middles = store.rest.state(store.middles), store.middles
    fresh = store_of().rest
    fresh._rows = store.rows
    fresh.restore(state, middles)
    for name in state:
        wrong = {**state, name: state[name][..., :-1]}
        with pytest.raises(ValueError, match=f"{name} of the rest must be"):
            fresh.restore(wrong, middles)
        holed = {**state, name: torch.full_like(state[name], torch.nan)}
        with pytest.raises(ValueError, match=f"{name} of the rest must be numbers; got NaN"):
            fresh.restore(holed, middles)


@pytest.mark.bad_input
@pytest.mark.parametrize("value", [1, "yes", None])
def test_an_option_that_is_no_truth_value(value):
    with pytest.raises(ValueError, match=f"estimate_rest must be true or false; got {value!r}"):
        Budget(max_tokens=10, estimate_rest=value)
