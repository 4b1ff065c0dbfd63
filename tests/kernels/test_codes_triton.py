"""Choice of rows by codes in Triton, against the reference; run where `triton_cases` says."""

import pytest
import torch

from saap.kernels.codes import Codes, PreparedChoice, QueryMap, encode, select_rows

from .code_cases import check_coding, rows, whole_numbers
from .triton_cases import DEVICE, MARKS

pytestmark = MARKS


def problem(n, group, coordinates, batch=2, n_kv=2, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, n_kv, n, coordinates, generator=draw)
    importance = torch.linspace(2.0, 0.1, coordinates).expand(1, n_kv, -1)
    q = torch.randn(batch, n_kv * group, coordinates, generator=draw) * 0.4
    q *= importance[0, 0].sqrt()  # what importance means
    codes = encode(x, importance)
    return q.to(DEVICE), Codes(*(t.to(DEVICE) for t in (codes.coarse, codes.fine, codes.scale)))


@pytest.mark.parametrize(
    ("n_kv", "n", "coordinates", "first"),
    [(1, 0, 64, 0), (1, 1, 64, 3), (3, 25, 64, 0), (2, 20, 192, 9), (1, 9, 256, 5)],
)
def test_keys_are_coded_as_by_the_reference(n_kv, n, coordinates, first):
    check_coding("triton", n_kv, n, coordinates, first, seed=n, device=DEVICE)


@pytest.mark.parametrize(
    ("coordinates", "group", "share", "n_candidates", "one_of"),
    [
        (64, 1, "group", 40, None),
        (64, 3, "head", 40, 5),
        (64, 3, "group", 10**6, 3),
        (128, 4, "group", 31, 4),
        (128, 20, "group", 10**6, None),
    ],
)
def test_chooses_as_the_reference(coordinates, group, share, n_candidates, one_of):
    q, codes = problem(300, group, coordinates)
    n_rows = [300, 210]
    heads = 2 if share == "group" else 2 * group
    found, scored = {}, {}
    for impl in ("reference", "triton"):
        scored[impl] = torch.zeros(2, heads, dtype=torch.int64, device=DEVICE)
        found[impl] = select_rows(
            q, codes, n_rows, max_tokens=30, n_candidates=n_candidates, one_of=one_of, share=share,
            first_row=5, scored=scored[impl], impl=impl,
        )  # fmt: skip
    assert (scored["triton"] - scored["reference"]).abs().max() <= 3
    for i in range(2):
        for h in range(heads):
            own, other = (rows(found[impl], i, h) for impl in ("triton", "reference"))
            assert own == sorted(set(own))
            assert len(own) == 30
            assert all(5 <= row < 5 + n_rows[i] for row in own)
            assert len(set(own) - set(other)) <= 1


@pytest.mark.parametrize(
    ("maps", "share", "dim", "coordinates", "dtype"),
    [
        (2, "group", 64, 64, torch.int16),
        (1, "head", 48, 64, torch.int8),
        (2, "group", 80, 128, torch.int8),
    ],
)
def test_maps_queries_as_the_reference(maps, share, dim, coordinates, dtype):
    _, codes = problem(300, 3, coordinates)
    q, query_map = whole_numbers(2, maps, 2, 3, dim, coordinates, dtype=dtype)
    q = q.to(DEVICE)
    query_map = QueryMap(query_map.weights.to(DEVICE), query_map.scale.to(DEVICE))
    options = {"max_tokens": 30, "n_candidates": 40, "share": share, "impl": "triton"}
    found = select_rows(q, codes, [300, 210], query_map=query_map, **options)
    expected = select_rows(query_map(q), codes, [300, 210], **options)
    for own, other in zip(found, expected, strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("n_candidates", [40, 10**6])
def test_a_prepared_choice_is_the_choice(n_candidates):
    """Also of codes that have changed, and often enough that a GPU replays it."""
    _, codes = problem(300, 2, 64, batch=1)
    out = tuple(torch.zeros(2, 1, 2, 30, dtype=torch.int32, device=DEVICE))
    options = {"max_tokens": 30, "n_candidates": n_candidates, "share": "group", "impl": "triton"}
    places = {"out": out, "scored": torch.zeros(1, 2, dtype=torch.int64, device=DEVICE)}
    choose = None
    for seed in range(4):
        q, fresh = problem(300, 2, 64, batch=1, seed=seed)
        codes.coarse.copy_(fresh.coarse)
        codes.fine.copy_(fresh.fine)
        codes.scale.copy_(fresh.scale)
        if choose is None:
            choose = PreparedChoice(q, codes, [210], **places, **options)
        expected = select_rows(q, fresh, [210], **options)
        for own, other in zip(choose(q), expected, strict=True):
            assert torch.equal(own, other)


def test_a_prepared_choice_follows_the_rows():
    """As rows join, which the codes have room for; not when there are more than `out` holds."""
    q, codes = problem(300, 1, 64)
    out = tuple(torch.zeros(2, 2, 2, 30, dtype=torch.int32, device=DEVICE))
    options = {"max_tokens": 30, "n_candidates": 40, "share": "group", "impl": "triton"}
    places = {"out": out, "scored": torch.zeros(2, 2, dtype=torch.int64, device=DEVICE)}
    choose = PreparedChoice(q, codes, [120, 30], **places, **options)
    for n_rows in ([120, 30], [150, 0], [300, 210]):
        assert choose.fits(q, codes, n_rows, **places, **options)
        expected = select_rows(q, codes, n_rows, **options)
        for own, other in zip(choose(q), expected, strict=True):
            assert torch.equal(own, other)
    assert not choose.fits(q, codes, [301, 210], **places, **options)
    assert not choose.fits(q, codes, [300], **places, **options)
    narrow = {**places, "out": tuple(t[..., :20].contiguous() for t in out)}
    choose = PreparedChoice(q, codes, [20, 20], **narrow, **options)
    assert not choose.fits(q, codes, [21, 20], **narrow, **options)


def test_of_many_candidates_the_last_is_found_from_a_sample():
    n, wanted = 9000, 4096
    q, codes = problem(n, 1, 64, batch=1)
    found, scored = {}, {}
    for impl in ("reference", "triton"):
        scored[impl] = torch.zeros(1, 2, dtype=torch.int64, device=DEVICE)
        chosen = select_rows(
            q, codes, [n], max_tokens=100, n_candidates=wanted, scored=scored[impl], impl=impl
        )
        found[impl] = [set(rows(chosen, 0, h)) for h in range(2)]
    assert scored["reference"].tolist() == [[wanted, wanted]]
    for own in scored["triton"][0].tolist():
        assert own != wanted  # it is a sample
        assert abs(own - wanted) < 0.1 * wanted
    for own, other in zip(found["triton"], found["reference"], strict=True):
        assert len(own) == 100
        assert len(own ^ other) <= 2


@pytest.mark.parametrize("n_candidates", [40, 10**6])
def test_chooses_rows_that_weigh_enough(n_candidates):
    q, codes = problem(300, 3, 64)
    outside = torch.tensor([[2.0] * 3 + [torch.nan] * 3, [-torch.inf] * 3 + [30.0] * 3])
    found = {}
    for impl in ("reference", "triton"):
        chosen = select_rows(
            q, codes, [300, 210], max_tokens=30, n_candidates=n_candidates, min_weight=0.025,
            outside=outside.to(DEVICE), impl=impl,
        )  # fmt: skip
        found[impl] = [rows(chosen, i, h) for i in range(2) for h in range(2)]
    assert found["triton"][3] == []
    assert all(0 < len(own) < 30 for own in found["triton"][:3])
    for own, other in zip(found["triton"], found["reference"], strict=True):
        assert len(set(own) ^ set(other)) <= 1


def test_sequences_with_few_rows_or_none():
    q, codes = problem(100, 2, 64)
    for candidates in (12, 1000):
        found = select_rows(
            q, codes, [100, 7], max_tokens=10, n_candidates=candidates, impl="triton"
        )
        assert [len(rows(found, 0, h)) for h in range(2)] == [10, 10]
        assert [rows(found, 1, h) for h in range(2)] == [list(range(7))] * 2
        found = select_rows(
            q, codes, [0, 100], max_tokens=10, n_candidates=candidates, impl="triton"
        )
        assert [len(rows(found, 0, h)) for h in range(2)] == [0, 0]


def test_a_query_of_nan_chooses_as_many_rows():
    q, codes = problem(100, 2, 64)
    found = select_rows(
        q * torch.nan, codes, [100, 100], max_tokens=10, n_candidates=20, impl="triton"
    )
    assert all(len(rows(found, i, h)) == 10 for i in range(2) for h in range(2))
