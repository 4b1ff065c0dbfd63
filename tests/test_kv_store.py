"""The KV store of a layer: every way to come to the same tokens gives the same attention."""

import pytest
import torch

from saap.budget import Budget
from saap.index.routers import CentroidRouter, MLPRouter
from saap.kernels.attention import reference
from saap.kv import KVStore, attend_chunk
from saap.methods import find_method
from saap.methods.learned import RoutedSelector
from saap.routing import LayerRouting
from saap.selector import LayerInfo

HKV, HQ, DIM, NLIST = 2, 4, 16, 8
FULL = Budget(nprobe=NLIST, n_sink=4, window=8, flush_every=8)
SMALL = Budget(nprobe=2, n_sink=4, window=8, flush_every=8)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def routing():
    centroids = torch.nn.functional.normalize(random(HKV, NLIST, DIM, seed=9), dim=-1)
    return LayerRouting(centroids, CentroidRouter(centroids))


def tokens(n, batch=1, seed=1):
    """`k_rope, v, k_derope` and `q_rope, q_derope` of n tokens."""
    k, v, kd = random(3, batch, HKV, n, DIM, seed=seed)
    q, qd = random(2, batch, HQ, n, DIM, seed=seed + 1)
    return (k, v, kd), (q, qd)


def part(tensors, start, stop):
    return tuple(t[:, :, start:stop] for t in tensors)


def store_of(routing, budget, **options):
    return KVStore(None if routing is None else RoutedSelector(routing), budget, **options)


def fed(routing, budget, keys, cuts, queries=None):
    """A store that got tokens up to each cut in one append, and the last `(out, lse)`."""
    store, found, start = store_of(routing, budget), None, 0
    for stop in cuts:
        store.append(*part(keys, start, stop))
        if queries is not None:
            found = store.attend(*part(queries, start, stop))
        start = stop
    return store, found


def expected(keys, q, n, n_queries=1):
    """Attention in float64 of the last of n tokens, causal."""
    k, v = (t[:, :, :n].double() for t in keys[:2])
    return attend_chunk(q[:, :, n - n_queries : n].double(), k, v, sm_scale=DIM**-0.5)


def assert_close(found, true):
    for got, exact in zip(found, true, strict=True):
        assert (got.double() - exact.double()).abs().max() < 4e-6


def rows_of(store, b=0):
    """Tokens by row and list of each head: the layout."""
    return store.rows.tokens[b, :, : store.lengths[b]], store.middles[b]


def assert_rows_are_tokens(store, keys):
    """Keys and values moved with the numbers of their tokens, each of which is there once."""
    layout, _ = rows_of(store)
    for head, rows in enumerate(layout.long()):
        assert torch.equal(rows.sort().values, torch.arange(store.length))
        assert torch.equal(store.k[0, head, : store.length], keys[0][0, head, rows])
        assert torch.equal(store.v[0, head, : store.length], keys[1][0, head, rows])


def every(n):
    return range(1, n + 1)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("cuts", [[60], [59, 60], [1, 30, 41, 60], list(every(60))])
def test_full_budget_is_dense(routing, cuts, softcap):
    keys, queries = tokens(60)
    store, _ = fed(routing, FULL, keys, cuts[:-1])
    start = cuts[-2] if len(cuts) > 1 else 0
    store.append(*part(keys, start, 60))
    found = store.attend(*part(queries, start, 60), softcap=softcap)
    k, v = (t.double() for t in keys[:2])
    true = attend_chunk(
        queries[0][:, :, start:].double(), k, v, sm_scale=DIM**-0.5, softcap=softcap
    )
    assert_close(found, true)


def test_dense_chunks_agree_with_the_kernel_reference():
    (k, v, _), (q, _) = tokens(40)
    out, lse = attend_chunk(q[:, :, 25:], k, v, sm_scale=0.3)
    for t in range(15):
        starts, lengths = torch.zeros(1, HKV, 1, dtype=torch.int32), torch.tensor([26 + t])
        lengths = lengths.int().expand(1, HKV, 1)
        true = reference.attend_ranges(
            q[:, :, 25 + t], k, v, starts, lengths, sm_scale=0.3, softcap=None
        )
        assert_close((out[:, :, t], lse[:, :, t]), true)


@pytest.mark.parametrize("length", [12, 40])
@pytest.mark.parametrize("window", [1, 7, 100])
def test_sliding_window_of_chunks(length, window):
    (k, v, _), (q, _) = tokens(40)
    out, _ = attend_chunk(q[:, :, 40 - length :], k, v, sm_scale=0.3, sliding_window=window)
    places = torch.arange(40)
    seen = (places <= places[:, None]) & (places > places[:, None] - window)
    true = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, scale=0.3, enable_gqa=True
    )
    assert (out - true[:, :, 40 - length :]).abs().max() < 2e-6


def test_step_by_step_is_at_once(routing):
    keys, queries = tokens(70)
    stores = [fed(routing, SMALL, keys, cuts)[0] for cuts in ([69], list(every(69)), [7, 50, 69])]
    outs = []
    for store in stores:
        store.append(*part(keys, 69, 70))
        outs.append(store.attend(*part(queries, 69, 70)))
        store.flush()
        assert torch.equal(rows_of(store)[0], rows_of(stores[0])[0])
    assert stores[0].middles == [56]
    for out in outs[1:]:
        assert torch.equal(out[0], outs[0][0])
        assert torch.equal(out[1], outs[0][1])


def test_layout(routing):
    keys, _ = tokens(70)
    store, _ = fed(routing, SMALL, keys, list(every(70)))
    store.flush()
    assert_rows_are_tokens(store, keys)
    layout, n_middle = rows_of(store)
    lists = routing.assign(keys[2])[0]
    for head, rows in enumerate(layout.long()):
        assert rows[:4].tolist() == [0, 1, 2, 3]
        assert rows[4 + n_middle :].tolist() == list(range(4 + n_middle, 70))
        order = [(int(lists[head, t]), int(t)) for t in rows[4 : 4 + n_middle]]
        assert order == sorted(order)


def test_small_budget_visits_best_lists(routing):
    keys, queries = tokens(70)
    store, (out, _) = fed(routing, SMALL, keys, [69, 70], queries)
    n_middle = store.middles[0]
    mass = routing.router.mass(queries[1][:, :, 69]).unflatten(1, (HKV, -1)).sum(2)[0]
    lists = routing.assign(keys[2])[0, :, 4 : 4 + n_middle]
    for head in range(HKV):
        held = mass[head].masked_fill(
            torch.bincount(lists[head], minlength=NLIST) == 0, -torch.inf
        )
        seen = torch.ones(70, dtype=torch.bool)
        seen[4 : 4 + n_middle] = torch.isin(lists[head], held.topk(2).indices.int())
        own = slice(2 * head, 2 * head + 2)
        weights = queries[0][0, own, 69] @ keys[0][0, head].T * DIM**-0.5
        true = weights.masked_fill(~seen, -torch.inf).softmax(-1) @ keys[1][0, head]
        assert (out[0, own, 0] - true).abs().max() < 2e-6
        assert not seen.all()


@pytest.mark.parametrize(
    ("budget", "full"),
    [
        ({"max_tokens": 10}, False),
        ({"max_tokens": 10, "share": "head"}, False),
        ({"nprobe": 5, "max_tokens": 10}, False),
        ({"top_p": 0.3}, False),
        ({"top_p": 1.0}, True),
        ({"max_tokens": 10**6}, True),
        ({"nprobe": 1, "dense_below": 70}, True),
        ({"nprobe": 1, "dense_below": 69}, False),
    ],
)
def test_budgets(routing, budget, full):
    keys, queries = tokens(70)
    budget = Budget(**budget, n_sink=4, window=8, flush_every=8)
    store, found = fed(routing, budget, keys, [69, 70], queries)
    true = expected(keys, queries[0], 70)
    if full:
        assert store.visited_share == 1.0
        assert_close(found, true)
    else:
        assert store.visited_share < 1
        assert (found[0] - true[0]).abs().max() > 1e-3
    if budget.max_tokens == 10:
        assert store.visited_share == pytest.approx((4 + 70 - 4 - store.middles[0] + 10) / 70)


def test_budget_of_a_step(routing):
    keys, queries = tokens(70)
    store, _ = fed(routing, SMALL, keys, [69])
    store.append(*part(keys, 69, 70))
    found = store.attend(*part(queries, 69, 70), FULL)
    assert_close(found, expected(keys, queries[0], 70))


@pytest.mark.parametrize("budget", [FULL, SMALL])
def test_batch_with_left_padding_is_each_alone(routing, budget):
    lengths = [60, 33, 3, 57]
    each = [tokens(n + 30, seed=10 * n) for n in lengths]
    batch = store_of(routing, budget)
    n = max(lengths)

    def padded(position, which):
        return torch.cat(
            [
                torch.nn.functional.pad(
                    pair[which][position][:, :, :own], (0, 0, n - own, 0), value=7.0
                )
                for pair, own in zip(each, lengths, strict=True)
            ]
        )

    mask = torch.arange(n) >= n - torch.tensor(lengths)[:, None]
    batch.append(*(padded(i, 0) for i in range(3)), mask=mask)
    together = [batch.attend(*(padded(i, 1) for i in range(2)))]
    for t in range(30):
        at = [
            [
                pair[w][i][:, :, own + t : own + t + 1]
                for pair, own in zip(each, lengths, strict=True)
            ]
            for w, i in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1))
        ]
        k, v, kd, q, qd = (torch.cat(parts) for parts in at)
        batch.append(k, v, kd)
        together.append(batch.attend(q, qd))
    for b, (own, (keys, queries)) in enumerate(zip(lengths, each, strict=True)):
        alone, first = fed(routing, budget, keys, [own], queries)
        assert_close(first, [t[b : b + 1, :, n - own :] for t in together[0]])
        for t in range(30):
            alone.append(*part(keys, own + t, own + t + 1))
            found = alone.attend(*part(queries, own + t, own + t + 1))
            assert_close(found, [x[b : b + 1] for x in together[1 + t]])
        assert torch.equal(rows_of(alone)[0], rows_of(batch, b)[0])
    assert (together[0][0][2, :, : n - 3] == 0).all()
    assert torch.isneginf(together[0][1][2, :, : n - 3]).all()


def cells_of(router, nlist) -> LayerRouting:
    """With 8 buckets scored by torch, with 16 by the kernel."""
    centroids = torch.nn.functional.normalize(random(HKV, nlist, DIM, seed=9), dim=-1)
    network = MLPRouter(
        torch.zeros(HQ, DIM), torch.ones(HQ, DIM), random(HQ, 16, DIM), random(HQ, 16),
        random(HQ, nlist + 1, 16) / 4, random(HQ, nlist + 1),
    )  # fmt: skip
    cells = LayerRouting(
        centroids,
        network if router == "mlp" else CentroidRouter(centroids),
        n_segments=3,
        key_scale=torch.full((HKV, nlist), 4.0),
        inv_freq=1.0 / 100 ** (torch.arange(DIM // 2) / (DIM // 2)),
        sm_scale=DIM**-0.5,
    )
    assert cells.n_lists == 3 * nlist
    return cells


@pytest.mark.parametrize("nlist", [8, 16])
@pytest.mark.parametrize("router", ["centroid", "mlp"])
def test_cells(router, nlist):
    """Buckets cut by age: more lists than buckets, the same rows."""
    cells = cells_of(router, nlist)
    keys, queries = tokens(70)
    whole = Budget(nprobe=3 * nlist, n_sink=4, window=8, flush_every=8)
    _, found = fed(cells, whole, keys, list(every(70)), queries)
    assert_close(found, expected(keys, queries[0], 70))
    few = Budget(max_tokens=20, n_sink=4, window=8, flush_every=8)
    outs = [fed(cells, few, keys, cuts, queries)[1] for cuts in ([69, 70], list(every(70)))]
    assert torch.equal(outs[0][0], outs[1][0])
    assert (outs[0][0] - found[0]).abs().max() > 1e-3
    # Beside a shorter sequence, which has no lists yet, and a longer one.
    longer, more = tokens(90, seed=5)
    batch = store_of(cells, few)
    given = [
        torch.cat([pad(a, 19), pad(b[:, :, :9], 80), b[:, :, :89]])
        for a, b in zip(part((*keys, *queries), 0, 70), (*longer, *more), strict=True)
    ]
    mask = torch.arange(89) >= torch.tensor([19, 80, 0])[:, None]
    batch.append(*given[:3], mask)
    ends = [torch.cat([a[:, :, -1:], b[:, :, 9:10], b[:, :, 89:]]) for a, b in zip(
        (*keys, *queries), (*longer, *more), strict=True)]  # fmt: skip
    batch.append(*ends[:3])
    together = batch.attend(*ends[3:])
    alone = store_of(cells, few)
    alone.append(*keys)
    alone.append(*(t[:, :, -1:] for t in keys))
    assert_close(alone.attend(*(t[:, :, -1:] for t in queries)), [t[:1] for t in together])


@pytest.mark.parametrize("share", ["group", "head"])
@pytest.mark.parametrize("nlist", [8, 16])
@pytest.mark.parametrize("router", ["centroid", "mlp"])
def test_min_weight_visits_what_is_predicted_to_weigh_as_much(router, nlist, share):
    cells = cells_of(router, nlist)
    keys, queries = tokens(70)
    places = {"n_sink": 4, "window": 8, "flush_every": 8, "share": share}
    whole, found = fed(cells, Budget(min_weight=1e-30, **places), keys, [69, 70], queries)
    assert whole.visited_share == 1.0
    assert_close(found, expected(keys, queries[0], 70))
    nothing, _ = fed(cells, Budget(min_weight=1e3, **places), keys, [69, 70], queries)
    middle = nothing.middles[0]
    assert nothing.visited_share == pytest.approx(1 - middle / 70)
    least = 0.01
    some, _ = fed(cells, Budget(min_weight=least, **places), keys, [69, 70], queries)
    sizes = torch.zeros(1, HKV, cells.n_lists, dtype=torch.int32)
    place = some.rows.tokens[:, :, 4 : 4 + middle].long() - 4
    lists = cells.lists_of(some.rows.lists[:, :, 4 : 4 + middle], place, middle)
    sizes.scatter_add_(-1, lists, torch.ones_like(lists, dtype=torch.int32))
    q = queries[1][:, :, 69]
    weights = cells.scores(q, sizes, middle, 65, share=share)
    rows = (sizes.repeat_interleave(weights.shape[1] // HKV, 1) * (weights >= least)).sum(-1)
    assert 0 < rows.sum() < rows.numel() * middle
    expected_share = (70 - middle + rows.float().mean()) / 70
    assert some.visited_share == pytest.approx(float(expected_share))
    capped, _ = fed(
        cells, Budget(min_weight=least, max_tokens=3, **places), keys, [69, 70], queries
    )
    assert capped.visited_share <= (70 - middle + 3) / 70 + 1e-6


def test_min_weight_needs_a_router_that_predicts_weights(routing):
    with pytest.raises(
        ValueError, match=r"min_weight needs a router that predicts.*got min_weight=0\.1"
    ):
        store_of(routing, Budget(min_weight=0.1))


def pad(x, n):
    return torch.nn.functional.pad(x, (0, 0, n, 0))


@pytest.mark.parametrize("left", [69, 62, 52, 30, 12, 4, 0])
@pytest.mark.parametrize("budget", [FULL, SMALL])
def test_truncate_is_never_having_been_longer(routing, left, budget):
    keys, queries = tokens(70)
    other, _ = tokens(70, seed=77)
    mixed = tuple(torch.cat([a[:, :, :left], b], 2) for a, b in zip(keys, other, strict=True))
    store, _ = fed(routing, budget, mixed, [left + 1, *range(left + 2, 71)])
    store.truncate(store.lengths[0] - left)
    assert store.lengths == [left]
    plain = store_of(routing, budget)
    if left:
        plain.append(*part(keys, 0, left))
    for t in range(left, 70):
        for mine in (store, plain):
            mine.append(*part(keys, t, t + 1))
        a, b = (mine.attend(*part(queries, t, t + 1)) for mine in (store, plain))
        if budget is FULL or store.middles == plain.middles:
            assert_close(a, b)
        assert store.lengths[0] - 4 - store.middles[0] >= min(8, t - 3)
    assert torch.equal(rows_of(store)[0], rows_of(plain)[0])


def test_beams(routing):
    keys, queries = tokens(50, batch=3)
    store, _ = fed(routing, SMALL, keys, list(every(45)))
    chosen = [2, 0, 0]
    store.select_sequences(chosen)
    k = tuple(torch.cat([t[chosen][:, :, :45], t[:, :, 45:]], 2) for t in keys)
    plain, _ = fed(routing, SMALL, k, [45])
    for t in range(45, 50):
        for mine in (store, plain):
            mine.append(*part(k, t, t + 1))
        assert_close(*(m.attend(*part(queries, t, t + 1)) for m in (store, plain)))
    for wider in ([0, 0, 1, 1, 2, 2], [1]):
        source, _ = fed(routing, SMALL, k, [48])
        source.select_sequences(wider)
        new = tuple(t[wider][:, :, 48:49] for t in k)
        source.append(*new)
        assert source.lengths == [49] * len(wider)
        true, _ = fed(routing, SMALL, tuple(t[wider] for t in k), [48, 49])
        q = tuple(t[wider][:, :, 48:49] for t in queries)
        assert_close(source.attend(*q), true.attend(*q))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(routing, dtype):
    keys, queries = (tuple(t.to(dtype) for t in group) for group in tokens(60))
    found = fed(routing, FULL, keys, [50, *range(51, 61)], queries)[1]
    true = expected(keys, queries[0], 60)
    eager = (queries[0][:, :, 59].float() @ torch.eye(DIM)).to(dtype)
    rounding = 4 * torch.finfo(dtype).eps * float(true[0].abs().max())
    assert found[0].dtype == dtype
    assert eager.dtype == dtype
    assert (found[0].double() - true[0]).abs().max() < rounding


def test_a_dense_layer_has_no_lists():
    keys, queries = tokens(60)
    store, found = fed(None, SMALL, keys, list(every(60)), queries)
    assert store.middles == [0]
    assert_close(found, expected(keys, queries[0], 60))


def test_memory(routing):
    keys, queries = tokens(4000)
    store, _ = fed(routing, SMALL, keys, [3000])
    rows = 2 * HKV * DIM * 4 + 2 * HKV * 4
    assert store.nbytes <= 1.05 * 3000 * rows
    store, _ = fed(routing, SMALL, keys, [3000, *range(3001, 3300)], queries)
    assert store.nbytes <= 1.13 * 3300 * rows + 80_000
    assert_rows_are_tokens(store, keys)  # so many that they moved in several pieces
    before = store.k.data_ptr()
    store.reserve(3000)
    assert store.k.data_ptr() == before
    roomy = store_of(routing, SMALL, capacity=4000)
    roomy.append(*part(keys, 0, 10))
    before = roomy.k.data_ptr()
    roomy.append(*part(keys, 10, 4000))
    assert roomy.k.data_ptr() == before


def test_no_memory_loses_nothing(routing):
    keys, queries = tokens(60)
    store, _ = fed(routing, FULL, keys, [59])
    with pytest.raises(MemoryError, match="no memory to grow a layer's rows from 123 to"):
        store.reserve(10**13)
    store.append(*part(keys, 59, 60))
    assert_close(store.attend(*part(queries, 59, 60)), expected(keys, queries[0], 60))


def test_other_failures_are_not_called_a_lack_of_memory(routing, monkeypatch):
    """A GPU that failed says so."""
    keys, _ = tokens(60)
    store, _ = fed(routing, FULL, keys, [59])

    def broken(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "empty", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        store.reserve(1000)


def append(**change):
    """A call that appends two tokens, changed."""

    def call(store):
        keys = dict(zip(("k_rope", "v", "k_derope"), tokens(2)[0], strict=True))
        store.append(**{**keys, **{name: make() for name, make in change.items()}})

    return call


def attend(n):
    return lambda store: store.attend(*tokens(n)[1])


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            append(k_rope=lambda: torch.zeros(1, HKV, DIM)),
            r"k_rope must be .*; got \(1, 2, 16\)",
        ),
        (
            append(v=lambda: torch.zeros(1, HKV, 3, DIM)),
            r"v must be .*got \(1, 2, 3, 16\)",
        ),
        (
            append(mask=lambda: torch.tensor([[True, False]])),
            "padding must be on the left; got a mask",
        ),
        (
            append(mask=lambda: torch.tensor([[False, True]])),
            "padding must be on the left; got a mask",
        ),
        (
            append(mask=lambda: torch.ones(1, 3).bool()),
            r"mask must be .*; got \(1, 3\)",
        ),
        (
            lambda s: s.append(*tokens(2, batch=2)[0]),
            r"those of the store, \(1, 2, 16.*; got \(2, 2, 16, ",
        ),
        (
            lambda s: s.append(*(t.half() for t in tokens(2)[0])),
            "must be those of the store, .*; got .*torch.float16",
        ),
        (
            append(k_rope=lambda: torch.zeros(1, HKV, 2, DIM, requires_grad=True)),
            "k_rope and v must require no gradient; got one",
        ),
        (attend(2), "must be of the 30 tokens appended last .*; got 2 tokens"),
        (lambda s: s.truncate(28), "must leave 0 or 4 to 30 tokens.*; got 2 of 30"),
        (lambda s: s.truncate(31), "got -1 of 30"),
        (lambda s: s.truncate(-1), "got 31 of 30"),
        (lambda s: s.select_sequences([0, 1]), r"a sequence must be in 0\.\.0; got 1"),
        (
            lambda s: (s.flush(), s.attend(*tokens(30)[1])),
            "must follow the append of its tokens at once",
        ),
        (lambda s: KVStore(s.selector, Budget(nprobe=9)), r"nprobe must be in 1\.\.8; got 9"),
        (lambda s: KVStore(s.selector, FULL).reserve(5), "before the first append; got none"),
    ],
)
def test_bad_input_changes_nothing(routing, call, message):
    keys, queries = tokens(31)
    store, _ = fed(routing, FULL, keys, [30])
    with pytest.raises(ValueError, match=message):
        call(store)
    assert store.lengths == [30]
    store.append(*part(keys, 30, 31))
    assert_close(store.attend(*part(queries, 30, 31)), expected(keys, queries[0], 31))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nprobe": 4, "top_p": 0}, "top_p must be above 0 and at most 1; got 0"),
        ({"top_p": "1"}, "top_p must be .*; got '1'"),
        ({"nprobe": 4, "flush_every": 0}, "flush_every must be an integer of at least 1; got 0"),
        ({"nprobe": 4, "dense_below": -1}, "dense_below must be an integer of at least 0; got -1"),
        ({"nprobe": True}, "nprobe must be an integer of at least 1; got True"),
        (
            {"nprobe": 4, "dense_layers": (0, -1)},
            r"dense_layers must be a tuple of .*; got \(0, -1\)",
        ),
        ({"nprobe": 4, "dense_layers": "01"}, "dense_layers must be a tuple of .*; got '01'"),
        ({"min_weight": 0}, "min_weight must be a number above 0; got 0"),
        ({}, "one of nprobe, max_tokens, top_p, min_weight must be set; got none"),
    ],
)
def test_budget_says_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        Budget(**options)
    assert Budget(nprobe=4, dense_layers=[0, 1]).dense_layers == (0, 1)


@pytest.mark.parametrize("every", [None, 1, 8, 512])
def test_rows_in_lists_never_fall_and_the_tail_is_short(every):
    budget = Budget(nprobe=4, n_sink=16, window=256, flush_every=every)
    before = 0
    for length in range(70_000):
        rows, spare = budget.rows_in_lists(length), length - 16 - 256
        assert before <= rows <= max(0, spare)
        # By default 8 tokens at most wait beside the window, or 1/128 of a long context.
        assert spare - rows < (every or max(8, spare / 128))
        before = rows
    assert Budget(nprobe=4).rows_in_lists(16 + 16 + 5 * 8 + 7) == 5 * 8


def test_the_tail_of_the_default_leaves_room_in_a_small_share():
    """1 % of 8,192 tokens can be visited: sinks and tail alone are less."""
    budget = Budget(max_tokens=0)
    assert 8192 - budget.rows_in_lists(8192) < 0.008 * 8192


def test_bytes_of_codes_are_told():
    """25 bytes for each key of 64 dimensions, beside 512 of key and value."""
    n, heads = 4000, 2
    k, v = torch.randn(2, 1, heads, n, 64, generator=torch.Generator().manual_seed(0))
    stores = [
        KVStore(find_method(name)().selector(LayerInfo(0.125)), Budget(max_tokens=64))
        for name in ("saap", "streaming")
    ]
    for store in stores:
        store.append(k, v, k)
        store.settle()
    more = stores[0].nbytes - stores[1].nbytes
    maps = 4 * 64 * 64 * 4 * heads
    assert 25 * heads * n * 0.9 < more < 25 * heads * n * 1.3 + maps


def test_a_first_chunk_of_padding_alone(routing):
    """A prompt in chunks, and every sequence of the batch begins after the first one."""
    keys, queries = tokens(40, batch=2)
    mask = (torch.arange(40) >= torch.tensor([3, 5])[:, None]).bool()
    store = store_of(routing, FULL)
    for start, stop in ((0, 2), (2, 40)):
        store.append(*part(keys, start, stop), mask[:, start:stop])
        out, lse = store.attend(*part(queries, start, stop))
        assert (out[~mask[:, start:stop][:, None].expand(-1, HQ, -1)] == 0).all()
    assert store.lengths == [37, 35]
    whole = store_of(routing, FULL)
    whole.append(*keys, mask)
    expected = whole.attend(*queries)
    ends = (tuple(t.nan_to_num(neginf=0.0) for t in pair) for pair in ((out, lse), expected))
    found, true = ends
    assert_close(found, tuple(t[:, :, 2:] for t in true))
