"""The rival selectors: each against a plain statement of its score, odd sizes, bad budgets."""

import pytest
import torch

from saap.budget import Budget
from saap.methods import METHODS, find_method
from saap.methods.hnsw import HNSWSearch
from saap.methods.kmeans_online import OnlineBuild, cluster_segments
from saap.methods.lsh import LSHBuild
from saap.methods.moments import MomentsBuild, PageMoments
from saap.methods.snapshot import LayerKeys, middle_scores
from saap.methods.tokens import rows_as_ranges
from saap.selector import LayerInfo

from .test_methods import problem_of

TOKEN_METHODS = ["oracle-tokens", "flat", "hnsw", "pq", "lsh"]
PAGE_METHODS = ["quest", "mean-pages", "moments-pages"]
SELF_CONTAINED = [*TOKEN_METHODS, *PAGE_METHODS, "kmeans-online"]
N_HEADS, N_KV, DIM = 4, 2, 16


def layer_keys(n_middle, seed=0, dim=DIM):
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(N_KV, n_middle, dim, generator=generator)
    return LayerKeys(LayerInfo(dim**-0.5), k)


def true_weights(keys, q):
    return middle_scores(keys.layer, keys.k_rope, q).softmax(-1)


def queries(n=3, seed=1, dim=DIM):
    return 2 * torch.randn(n, N_HEADS, dim, generator=torch.Generator().manual_seed(seed))


def select(name, keys, q, budget, outside=None, **options):
    method = find_method(name)(None, **options)
    method.check_budget(budget)
    chooser = method.build(keys)
    return chooser, *chooser.select(q, budget, outside)


def rows_of(starts, lengths):
    """Sorted rows of each query and head, as lists `[n][H]`."""
    return [
        [
            sorted(r for s, n in zip(a, b, strict=True) for r in range(s, s + n))
            for a, b in zip(one.tolist(), other.tolist(), strict=True)
        ]
        for one, other in zip(starts, lengths, strict=True)
    ]


@pytest.mark.parametrize("share", ["group", "head"])
@pytest.mark.parametrize("n_middle", [1, 5, 37, 129])
@pytest.mark.parametrize("name", SELF_CONTAINED)
def test_any_number_of_rows_fills_the_budget_once(name, n_middle, share):
    for max_tokens in (0, 1, 20, 200):
        budget = Budget(max_tokens=max_tokens, share=share)
        selector, starts, lengths = select(name, layer_keys(n_middle), queries(), budget)
        assert starts.dtype == lengths.dtype == torch.int32
        assert starts.shape[:2] == (3, N_KV if share == "group" else N_HEADS)
        order = range(n_middle) if selector.order is None else selector.order[0].tolist()
        assert sorted(order) == list(range(n_middle))
        for heads in rows_of(starts, lengths):
            for rows in heads:
                assert len(set(rows)) == len(rows) == min(max_tokens, n_middle)
                assert all(0 <= r < n_middle for r in rows)


@pytest.mark.parametrize("name", TOKEN_METHODS)
def test_token_methods_refuse_nprobe(name):
    message = f"method '{name}' follows max_tokens; got nprobe=4"
    with pytest.raises(ValueError, match=message):
        select(name, layer_keys(50), queries(), Budget(nprobe=4))


@pytest.mark.parametrize("name", PAGE_METHODS)
def test_nprobe_counts_pages(name):
    _, _, lengths = select(name, layer_keys(160), queries(), Budget(nprobe=3))
    assert (lengths % 16 == 0).all()  # pages that touch are one range
    assert (lengths.sum(-1) == 3 * 16).all()
    # How many pages there will be is not known beforehand: more than there are is all.
    _, _, lengths = select(name, layer_keys(160), queries(), Budget(nprobe=11))
    assert (lengths.sum(-1) == 160).all()


def test_rows_as_ranges_joins_neighbours():
    starts, lengths = rows_as_ranges(torch.tensor([[[7, 3, 4, 5, 9], [4, 2, 0, 8, 6]]]))
    assert starts[0, 0].tolist() == [3, 7, 9, 0, 0]
    assert lengths[0, 0].tolist() == [3, 1, 1, 0, 0]
    assert rows_of(starts, lengths)[0][1] == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("name", ["oracle-tokens", "flat"])
def test_exact_methods_find_the_true_top(name):
    keys, q = layer_keys(200), queries()
    _, starts, lengths = select(name, keys, q, Budget(max_tokens=25, share="head"))
    best = true_weights(keys, q).topk(25).indices.sort(-1).values
    assert rows_of(starts, lengths) == best.tolist()


def test_oracle_tokens_knows_the_soft_cap():
    keys = layer_keys(100)
    capped = LayerKeys(LayerInfo(keys.layer.sm_scale, softcap=0.5), keys.k_rope)
    weights = true_weights(capped, queries()).unflatten(1, (N_KV, -1)).sum(2)
    _, starts, lengths = select("oracle-tokens", capped, queries(), Budget(max_tokens=10))
    assert rows_of(starts, lengths) == weights.topk(10).indices.sort(-1).values.tolist()


def recall_of_top(name, keys, q, k=32, **options):
    _, starts, lengths = select(name, keys, q, Budget(max_tokens=k, share="head"), **options)
    best = true_weights(keys, q).topk(k).indices.tolist()
    found = rows_of(starts, lengths)
    hits = [
        len(set(a) & set(b))
        for mine, true in zip(found, best, strict=True)
        for a, b in zip(mine, true, strict=True)
    ]
    return sum(hits) / (k * len(hits))


@pytest.mark.parametrize(
    ("name", "floor"),
    [("hnsw", 0.95), ("pq", 0.45), ("lsh", 0.4)],  # measured: 1.00, 0.50, 0.47
)
def test_approximate_search_finds_most(name, floor):
    assert recall_of_top(name, layer_keys(600), queries(16)) >= floor


def test_search_parameters_trade_bytes_for_recall():
    keys, q = layer_keys(3000), queries(16)
    budget = Budget(max_tokens=8, share="head")
    read = []
    for ef in (8, 64, 512):
        selector, _, _ = select("hnsw", keys, q, budget, search=HNSWSearch(ef=ef))
        read.append(selector.nbytes)
    assert read == sorted(set(read))
    assert read[-1] < N_HEADS * keys.k_rope[0].numel() * 4


def test_more_tables_find_more():
    few, many = (
        recall_of_top("lsh", layer_keys(600), queries(16), build=LSHBuild(8, tables))
        for tables in (10, 300)
    )
    assert many > few + 0.05  # measured: 0.24 and 0.64


def test_lsh_options():
    with pytest.raises(ValueError, match=r"n_bits must be a whole number in 1\.\.15; got 16"):
        LSHBuild(n_bits=16)


def test_quest_bounds_every_key_of_its_page():
    keys, q = layer_keys(64), queries()
    bounds = find_method("quest")(None).build(keys).page_scores(q)
    true = torch.einsum("nhgd,hmd->nhgm", q.unflatten(1, (N_KV, -1)), keys.k_rope)
    best = (true * keys.layer.sm_scale).flatten(1, 2).unflatten(-1, (-1, 16)).amax(-1)
    assert (bounds >= best - 1e-5).all()
    corner = keys.k_rope.unflatten(1, (-1, 16))
    plain = torch.maximum(
        q.unflatten(1, (N_KV, -1))[:, :, :, None] * corner.amax(2)[None, :, None],
        q.unflatten(1, (N_KV, -1))[:, :, :, None] * corner.amin(2)[None, :, None],
    ).sum(-1)
    assert torch.allclose(bounds, plain.flatten(1, 2) * keys.layer.sm_scale, atol=1e-5)


def test_moments_are_the_cumulants_and_full_rank_is_exact():
    keys, q = layer_keys(400), queries()
    pages = keys.k_rope.unflatten(1, (-1, 16))
    mean = pages.mean(2)
    centred = pages - mean[:, :, None]
    sigma = centred.mT @ centred / 16
    a = q.unflatten(1, (N_KV, -1)) * keys.layer.sm_scale
    linear = torch.einsum("nhgd,hpd->nhgp", a, mean)
    second = torch.einsum("nhgd,hpde,nhge->nhgp", a, sigma, a)
    diagonal = torch.einsum("nhgd,hpd->nhgp", a**2, sigma.diagonal(dim1=-2, dim2=-1))
    for rank, form in ((0, diagonal), (DIM, second)):
        method = find_method("moments-pages")(None, build=MomentsBuild(rank=rank))
        selector = method.build(keys)
        assert isinstance(selector, PageMoments)
        expected = (torch.tensor(16.0).log() + linear + form / 2).flatten(1, 2)
        assert torch.allclose(selector.statistics.log_mass(q), expected, atol=1e-4)


def test_higher_rank_estimates_mass_better():
    keys, q = layer_keys(640), queries(16) / 2
    true = true_weights(keys, q).unflatten(-1, (-1, 16)).sum(-1)
    errors = []
    for rank in (0, 4, 12):
        selector = find_method("moments-pages")(None, build=MomentsBuild(rank=rank)).build(keys)
        errors.append((selector.statistics.log_mass(q).softmax(-1) - true).abs().sum().item())
    assert errors[2] < errors[1] < errors[0]


def test_online_clusters_stay_in_their_segment():
    keys = layer_keys(300).k_rope
    buckets, number = cluster_segments(keys, OnlineBuild(segment=128, rows_per_cluster=16), seed=0)
    assert number == 8 + 8 + 2
    assert buckets[:, :128].max() < 8 <= buckets[:, 128:256].min()
    assert buckets[:, 256:].min() >= 16


@pytest.mark.parametrize("name", ["moments", *SELF_CONTAINED])
def test_bytes_are_counted(name, reference_model, captured, reference_index):
    problem, budget = problem_of(reference_model, captured), Budget(max_tokens=20, window=32)
    store = problem.store_for(METHODS[name](reference_index), budget)
    problem.attend(store, budget)
    assert (store.selector.nbytes == 0) == (name == "oracle-tokens")
