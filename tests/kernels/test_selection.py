"""Selection of lists, on every implementation, against the definition taken one list at a time."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saap.index.lists import offsets_of
from saap.kernels.routing import numba as cpu
from saap.kernels.routing import select_lists

IMPLS = ("reference", "numba")
CANARY = -77


def rows(ranges, b, h) -> list[int]:
    starts, lengths = (t[b, h].tolist() for t in ranges)
    return sorted(r for a, n in zip(starts, lengths, strict=True) for r in range(a, a + n))


def expected_rows(scores, offsets, *, nprobe, max_tokens, top_p, min_score, per_row, first_row):
    """Rows visited by one row of scores: Python numbers, one list after the other."""
    size_of = [b - a for a, b in itertools.pairwise(offsets)]
    floor = -math.inf if min_score is None else min_score
    left = [i for i, n in enumerate(size_of) if n]
    left = [i for i in left if floor == -math.inf or scores[i] >= floor]
    mass = {i: max(scores[i], 0.0) * (size_of[i] if per_row else 1) for i in left}
    mass = {i: 0.0 if math.isnan(scores[i]) else m for i, m in mass.items()}
    # Sorting is stable: of equal ones the first comes first; NaN after -inf.
    left.sort(key=lambda i: (math.isnan(scores[i]), 0 if math.isnan(scores[i]) else -scores[i]))
    by_mass = top_p not in (None, 1.0)
    share = top_p * sum(mass.values()) if by_mass else math.inf
    found, lists, reached = [], 0, 0.0
    for i in left:
        room = math.inf if max_tokens is None else max_tokens - len(found)
        if lists == nprobe or room <= 0:
            break
        if by_mass and lists and reached >= share:
            break
        taken = int(min(size_of[i], room))
        found += range(offsets[i + 1] - taken, offsets[i + 1])
        lists, reached = lists + 1, reached + mass[i]
    return sorted(first_row + r for r in found)


bounds = st.fixed_dictionaries(
    {
        "nprobe": st.none() | st.integers(1, 12),
        "max_tokens": st.none() | st.integers(0, 60),
        "top_p": st.none() | st.integers(1, 16).map(lambda n: n / 16),
        "min_score": st.none() | st.sampled_from([-math.inf, -1.0, 0.0, 0.25, 2.0, math.inf]),
    }
).filter(lambda given: any(bound is not None for bound in given.values()))

# Sums of these are exact, so that whether a share of them is reached does not depend on an order.
numbers = st.integers(-8, 40).map(lambda n: n / 4) | st.just(-0.0)
special = st.sampled_from([math.nan, math.inf, -math.inf, 3e38, -3e38])
lists = st.lists(st.tuples(numbers | special, st.integers(0, 6)), min_size=12, max_size=60)


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=300, deadline=None)
@given(lists=lists, per_row=st.booleans(), bounds=bounds, spare=st.integers(0, 3))
def test_ties_nan_and_infinities_and_nothing_is_written_beside(
    impl, lists, per_row, bounds, spare
):
    n = len(lists)
    scores = torch.tensor([[[score for score, _ in lists]]])
    scores = torch.cat([scores, scores.flip(-1), torch.full_like(scores, torch.nan)], 1)
    offsets = offsets_of(torch.tensor([[[size for _, size in lists]]], dtype=torch.int32))
    room = min(x for x in (n, bounds["nprobe"], bounds["max_tokens"]) if x is not None) + spare
    memory = torch.full((2, 1, 3, room + 8), CANARY, dtype=torch.int32)
    out = tuple(memory[..., 4 : 4 + room])
    options = bounds | {"per_row": per_row, "first_row": 3}
    found = select_lists(scores, offsets, **options, out=out, impl=impl)
    for h in range(3):
        expected = expected_rows(scores[0, h].tolist(), offsets[0, 0].tolist(), **options)
        assert rows(found, 0, h) == expected
        assert rows(out, 0, h) == expected  # what is not used is 0
    assert (memory[..., :4] == CANARY).all()
    assert (memory[..., 4 + room :] == CANARY).all()


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(12, 300),
    largest=st.integers(1, 9),
    signed=st.booleans(),
    per_row=st.booleans(),
    shared=st.booleans(),
    bounds=bounds,
)
def test_both_visit_the_same_rows(seed, n, largest, signed, per_row, shared, bounds):
    generator = torch.Generator().manual_seed(seed)
    shape = (1 if shared else 2, 2, n)
    sizes = torch.randint(0, largest + 1, shape, generator=generator, dtype=torch.int32)
    scores = torch.randn(2, 4, n, generator=generator)
    scores = scores if signed else scores.exp()
    options = bounds | {"per_row": per_row, "first_row": 3}
    found, expected = (
        select_lists(scores, offsets_of(sizes), **options, impl=impl) for impl in IMPLS
    )
    for b in range(2):
        for h in range(4):
            assert rows(found, b, h) == rows(expected, b, h)


@pytest.mark.parametrize("seed", range(20))
def test_rounding_of_masses_never_lets_everything_in(seed):
    """A bound that one order of adding reaches and another just misses."""
    generator = torch.Generator().manual_seed(seed)
    scores = 1.0 + torch.rand(1, 1, 400, generator=generator) / 8
    scores[..., 200:] = -1.0
    offsets = offsets_of(torch.ones(1, 1, 400, dtype=torch.int32))
    almost_all = math.nextafter(1.0, 0.0)
    _, lengths = select_lists(scores, offsets, top_p=almost_all, impl="numba")
    assert 199 <= int(lengths.sum()) <= 200


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_is_last(impl):
    scores = torch.tensor([[[torch.nan, 1.0, -torch.inf, -torch.nan, 2.0, 0.0]]])
    offsets = offsets_of(torch.tensor([[[1, 1, 1, 1, 1, 0]]], dtype=torch.int32))
    for nprobe, visited in ((1, [4]), (2, [1, 4]), (3, [1, 2, 4]), (4, [0, 1, 2, 4])):
        assert rows(select_lists(scores, offsets, nprobe=nprobe, impl=impl), 0, 0) == visited
    assert rows(select_lists(scores, offsets, min_score=-5.0, impl=impl), 0, 0) == [1, 4]
    assert rows(select_lists(scores, offsets, top_p=0.9, impl=impl), 0, 0) == [1, 4]


def test_equal_scores_are_taken_from_the_first_on_and_touching_lists_join():
    offsets = offsets_of(torch.full((1, 1, 10), 4, dtype=torch.int32))
    scores = torch.ones(1, 1, 10)
    starts, lengths = select_lists(scores, offsets, max_tokens=10, impl="numba")
    assert starts.tolist() == [[[0, 10]]]
    assert lengths.tolist() == [[[8, 2]]]  # the last one is cut to its newest rows
    for bound in ({"nprobe": 2}, {"top_p": 0.2}):
        starts, lengths = select_lists(scores, offsets, **bound, impl="numba")
        assert (starts.tolist(), lengths.tolist()) == ([[[0]]], [[[8]]])


@pytest.mark.parametrize("impl", IMPLS)
def test_ranges_are_written_where_asked(impl):
    offsets = offsets_of(torch.full((1, 2, 6), 2, dtype=torch.int32))
    scores = torch.arange(24.0).view(1, 4, 6)
    own = torch.full((2, 1, 4, 7), -1, dtype=torch.int32)
    out = own[0, ..., 2:], own[1, ..., 2:]
    starts, _ = select_lists(scores, offsets, nprobe=3, max_tokens=5, out=out, impl=impl)
    assert starts.data_ptr() == own[0, ..., 2:].data_ptr()
    assert (own[..., :2] == -1).all()
    assert own[1, ..., 2:].sum(-1).tolist() == [[5] * 4]


def test_the_kernel_itself_writes_no_more_than_there_is_room_for():
    offsets = offsets_of(torch.tensor([[[1, 1] * 10]], dtype=torch.int32))
    scores = torch.tensor([[[1.0, 0.0] * 10]])
    memory = torch.full((2, 1, 1, 12), CANARY, dtype=torch.int32)
    with pytest.raises(ValueError, match="room for the selection; got 3 ranges"):
        cpu.select_lists(
            scores, offsets, nprobe=10, max_tokens=None, top_p=None, min_score=None,
            per_row=False, first_row=0, out=tuple(memory[..., :3]),
        )  # fmt: skip
    assert (memory[..., 3:] == CANARY).all()


BAD_OFFSETS = {
    "smaller": ([0, 4, 3, 9], 0, r"offsets\[0, 1, 2\] must be at least the one before; got 3"),
    "negative": ([-1, 4, 5, 9], 0, r"offsets\[0, 1, 0\] must be at least 0; got -1"),
    "wrapped": ([0, 2**31 - 1, -(2**31), 5], 0, r"offsets\[0, 1, 2\] must be .*; got -2147483648"),
    "too far": ([0, 4, 5, 9], 2**31 - 5, r"offsets\[0, 1, 2\] must be at most 2147483647 .*got 5"),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bound", [{"nprobe": 2}, {"max_tokens": 4}, {"top_p": 0.5}], ids=str)
@pytest.mark.parametrize(("values", "first_row", "message"), BAD_OFFSETS.values(), ids=BAD_OFFSETS)
def test_offsets_that_are_none_are_refused(impl, bound, values, first_row, message):
    offsets = torch.tensor([[[0, 1, 2, 3], values]], dtype=torch.int32)
    memory = torch.full((2, 1, 2, 12), CANARY, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        select_lists(
            torch.randn(1, 2, 3), offsets, **bound, first_row=first_row, impl=impl,
            out=tuple(memory[..., :4]),
        )  # fmt: skip
    assert (memory[..., 4:] == CANARY).all()


@pytest.mark.parametrize("impl", [*IMPLS, None])
@pytest.mark.parametrize(("batch", "n"), [(0, 5), (2, 0), (0, 0)])
def test_nothing_to_choose_from(impl, batch, n):
    offsets = torch.zeros(batch, 2, n + 1, dtype=torch.int32)
    starts, lengths = select_lists(torch.zeros(batch, 2, n), offsets, max_tokens=5, impl=impl)
    assert starts.shape == lengths.shape == (batch, 2, 0)


def lists_of(**changes):
    """Scores of two sequences, four heads, six lists; `changes` replace arguments."""
    good = {
        "scores": torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)),
        "offsets": offsets_of(torch.full((2, 2, 6), 3, dtype=torch.int32)),
        "nprobe": 3,
    }
    return good | changes


def out_of(*shape, dtype=torch.int32):
    return tuple(torch.zeros(2, *shape, dtype=dtype))


WRONG = {
    "rank": ({"scores": torch.randn(4, 6)}, r"scores must be \[B, H, nlist\]; got shape \(4, 6\)"),
    "integers": (
        {"scores": torch.ones(2, 4, 6).int()},
        "scores must have dtype .*; got torch.int",
    ),
    "offsets": (
        {"offsets": torch.zeros(2, 2, 6, dtype=torch.int32)},
        r"offsets must be .*B = 2, nlist = 6; got shape \(2, 2, 6\)",
    ),
    "batch": (
        {"offsets": torch.zeros(3, 2, 7, dtype=torch.int32)},
        r"offsets must be \[B or 1, .*; got shape \(3, 2, 7\)",
    ),
    "heads": (
        {"offsets": torch.zeros(2, 3, 7, dtype=torch.int32)},
        "scores must have a multiple of the 3 heads of offsets; got 4",
    ),
    "int64": ({"offsets": lists_of()["offsets"].long()}, "offsets must .*int32; got torch.int64"),
    "elsewhere": (
        {"offsets": lists_of()["offsets"].to("meta")},
        "offsets must be on cpu; got meta",
    ),
    "no list": ({"nprobe": 0}, r"nprobe must be in 1\.\.6; got 0"),
    "too many": ({"nprobe": 7}, r"nprobe must be in 1\.\.6; got 7"),
    "max_tokens": ({"max_tokens": -1}, "max_tokens must be at least 0 .*; got -1"),
    "top_p": ({"top_p": 0.0}, r"top_p must be above 0 and at most 1; got 0\.0"),
    "top_p's NaN": ({"top_p": math.nan}, "top_p must be above 0 and at most 1; got nan"),
    "min_score": ({"min_score": math.nan}, "min_score must be a number; got nan"),
    "no bound": ({"nprobe": None}, "one of nprobe, max_tokens, .* must be given; got none"),
    "first_row": ({"first_row": -1}, "first_row must be in 0.*; got -1"),
    "out's room": ({"out": out_of(2, 4, 2)}, r"starts must be .*R at least 3; got .*\(2, 4, 2\)"),
    "out's dtype": ({"out": out_of(2, 4, 6, dtype=torch.int64)}, "starts must have dtype int32"),
    "out's heads": ({"out": out_of(2, 2, 6)}, r"starts must be .*\(2, 4\) .*; got .*\(2, 2, 6\)"),
    "impl": ({"impl": "triton"}, "impl must be .* reference, numba; got 'triton'"),
}


@pytest.mark.parametrize("impl", [*IMPLS, None])
@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_arguments_that_do_not_fit_are_named(changes, message, impl):
    with pytest.raises(ValueError, match=message):
        select_lists(**{"impl": impl} | lists_of(**changes))


def uneven():
    return tuple(torch.zeros(2, 2, 5, 6, dtype=torch.int32)[:, :, :4])


CANNOT = {
    "float64": (lambda: {"scores": lists_of()["scores"].double()}, "scores .*; got torch.float64"),
    "a gap between sequences": (lambda: {"out": uneven()}, r"out's starts .*strides \(30, 6, 1\)"),
    "transposed": (
        lambda: {"out": tuple(t.transpose(1, 2) for t in out_of(2, 6, 4))},
        r"out's starts must have rows evenly apart.*strides \(24, 1, 4\)",
    ),
    "overlapping": (
        lambda: {"out": tuple(t[:, :1].expand(-1, 4, -1) for t in out_of(2, 1, 6))},
        r"out's starts must have rows evenly apart",
    ),
}


@pytest.mark.parametrize(("change", "message"), CANNOT.values(), ids=CANNOT)
def test_what_numba_cannot_do_is_told(change, message):
    with pytest.raises(ValueError, match=message):
        select_lists(**lists_of(**change()), impl="numba")


@pytest.mark.parametrize("kind", ["float64", "a gap between sequences", "transposed"])
def test_none_takes_what_can(kind):
    change = CANNOT[kind][0]
    found = select_lists(**lists_of(**change()))
    expected = select_lists(**lists_of(**change()), impl="reference")
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_sign_still_to_be_changed_is_changed(impl):
    given = lists_of()
    lazy = {n: torch._neg_view(-given[n]) for n in ("scores", "offsets")}
    found = select_lists(**given | lazy, impl=impl)
    expected = select_lists(**given, impl=impl)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
