"""What holds for every selection: properties over drawn shapes, ranges and lengths."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saap.kernels.attention import attend_ranges, attend_shared_prefix, merge_states

from ..torch_threads import torch_threads
from .budget import assert_within_budget, rounding

IMPLS = ["reference", "numba"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def examples(count: int):
    return settings(max_examples=count, deadline=None, derandomize=True)


@dataclass(frozen=True)
class Problem:
    q: Tensor
    k: Tensor
    v: Tensor
    starts: Tensor
    lengths: Tensor
    softcap: float | None = None

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v, self.starts, self.lengths

    def attend(self, impl: str) -> tuple[Tensor, Tensor]:
        return attend_ranges(*self.inputs, softcap=self.softcap, impl=impl)

    def check(self, result: tuple[Tensor, Tensor]) -> None:
        scale = self.q.shape[-1] ** -0.5
        assert_within_budget(result, self.inputs, sm_scale=scale, softcap=self.softcap)

    def selected(self) -> Tensor:
        """bool `[B, lists, N]`: the rows that some range of a list selects."""
        rows = torch.arange(self.k.shape[2])
        starts, lengths = self.starts[..., None], self.lengths[..., None]
        return ((rows >= starts) & (rows < starts + lengths)).any(-2)


@st.composite
def problems(draw, dtypes=(torch.float32,), softcaps=(None,), scale=1) -> Problem:
    """Ranges in any order, touching or apart, some of length 0, and lists of those alone.

    Half of the stores have rows enough for several workers and partial results.
    """
    batch, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    group, n_ranges = draw(st.integers(1, 9)), draw(st.integers(0, 9))
    rows = draw(st.one_of(st.integers(1, 70), st.integers(300, 1300)))
    dim = draw(st.sampled_from([16, 48, 64, 128]))
    lists = kv_heads * draw(st.sampled_from([1, group]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from(dtypes))

    q = scale * torch.randn(batch, kv_heads * group, dim, generator=generator)
    k, v = torch.randn(2, batch, kv_heads, rows, dim, generator=generator)
    cuts = torch.randint(0, rows + 1, (batch, lists, 2 * n_ranges), generator=generator)
    cuts = cuts.sort(-1).values
    order = torch.rand(batch, lists, n_ranges, generator=generator).argsort(-1)
    starts = cuts[..., ::2].gather(-1, order)
    lengths = (cuts[..., 1::2] - cuts[..., ::2]).gather(-1, order)
    lengths[torch.rand(batch, lists, generator=generator) < 0.15] = 0
    return Problem(
        q.to(dtype), k.to(dtype), v.to(dtype), starts.int(), lengths.int(),
        draw(st.sampled_from(softcaps)),
    )  # fmt: skip


def masked_softmax(problem: Problem) -> tuple[Tensor, Tensor]:
    """The definition, in float64: one softmax over all rows, the others at -inf."""
    q, k, v = (x.double() for x in (problem.q, problem.k, problem.v))
    q_heads, dim = q.shape[1:]
    k, v = (x.repeat_interleave(q_heads // k.shape[1], 1) for x in (k, v))
    mask = problem.selected().repeat_interleave(q_heads // problem.starts.shape[1], 1)
    scores = torch.einsum("bhd,bhnd->bhn", q, k) / math.sqrt(dim)
    if problem.softcap is not None:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)
    return torch.einsum("bhn,bhnd->bhd", weights, v), torch.logsumexp(scores, -1)


@examples(30)
@given(problem=problems(softcaps=(None, 5.0)))
def test_the_reference_is_the_definition(problem):
    doubled = {name: getattr(problem, name).double() for name in "qkv"}
    exact = replace(problem, **doubled).attend("reference")
    for got, want in zip(exact, masked_softmax(problem), strict=True):
        finite = torch.isfinite(want)
        assert torch.equal(torch.isfinite(got), finite)
        error = (got.double() - want)[finite].abs()
        assert (error <= 4 * rounding(want, got.dtype)).all()


@examples(60)
@given(problem=problems(dtypes=DTYPES, softcaps=(None, 5.0)))
def test_numba_is_within_the_error_budget(problem):
    problem.check(problem.attend("numba"))


@pytest.mark.parametrize("impl", IMPLS)
@examples(15)
@given(problem=problems(scale=100))
def test_scores_may_differ_by_more_than_exp_can_hold(impl, problem):
    """Scores in the hundreds, where an error of a score is one of the weights' exponents.

    Few heads decide the largest error, so the budget is what rounding does to a score.
    """
    q, k, v = (x.double() for x in (problem.q, problem.k, problem.v))
    largest = float(q.norm(dim=-1).max() * k.norm(dim=-1).max()) / math.sqrt(q.shape[-1])
    allowed = 2 * torch.finfo(torch.float32).eps * largest
    exact = replace(problem, q=q, k=k, v=v).attend("reference")
    empty = torch.isneginf(exact[1])
    scales = (2 * float(v.abs().max()), 1)
    for got, want, scale in zip(problem.attend(impl), exact, scales, strict=True):
        assert ((got - want)[~empty].abs() <= allowed * scale).all()


@pytest.mark.parametrize("impl", IMPLS)
@examples(20)
@given(problem=problems(), seed=st.integers(0, 2**32))
def test_any_order_of_rows_gives_the_same_output(impl, problem, seed):
    """The selected rows, found again as single tokens of a shuffled store."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(problem.k.shape[2], generator=generator)
    starts = torch.arange(len(order)).expand(problem.selected().shape)
    lengths = problem.selected()[..., order]
    shuffled = replace(
        problem,
        k=problem.k[:, :, order],
        v=problem.v[:, :, order],
        starts=starts.int().contiguous(),
        lengths=lengths.int(),
    )
    problem.check(shuffled.attend(impl))


@pytest.mark.parametrize("impl", IMPLS)
@examples(20)
@given(problem=problems(), share=st.floats(0, 1))
def test_two_parts_merge_to_the_whole(impl, problem, share):
    """Every range cut in two at `share` of its length."""
    first = (problem.lengths * share).int()
    second = replace(problem, starts=problem.starts + first, lengths=problem.lengths - first)
    one, two = replace(problem, lengths=first).attend(impl), second.attend(impl)
    problem.check(merge_states(*one, *two))


@examples(20)
@given(problem=problems(), cuts=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_merging_is_associative_and_commutative(problem, cuts):
    low, high = ((problem.lengths * cut).int() for cut in sorted(cuts))
    a, b, c = (
        replace(problem, starts=problem.starts + begin, lengths=end - begin).attend("reference")
        for begin, end in ((0, low), (low, high), (high, problem.lengths))
    )
    problem.check(merge_states(*merge_states(*a, *b), *c))
    problem.check(merge_states(*a, *merge_states(*b, *c)))
    for x, y in zip(merge_states(*a, *b), merge_states(*b, *a), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("threads", [1, 2, 3])
@examples(15)
@given(problem=problems(dtypes=DTYPES))
def test_runs_are_bit_equal_at_one_number_of_threads(threads, problem):
    with torch_threads(threads):
        first = problem.attend("numba")
        for _ in range(5):
            for x, y in zip(first, problem.attend("numba"), strict=True):
                assert torch.equal(x, y)
    problem.check(first)


@pytest.mark.parametrize("impl", IMPLS)
@examples(15)
@given(problem=problems(), prefix_rows=st.integers(0, 200))
def test_a_shared_prefix_is_a_prefix_of_every_sequence(impl, problem, prefix_rows):
    q, k, v, starts, lengths = problem.inputs
    generator = torch.Generator().manual_seed(prefix_rows)
    prefix_k, prefix_v = torch.randn(2, k.shape[1], prefix_rows, k.shape[3], generator=generator)
    result = attend_shared_prefix(q, prefix_k, prefix_v, k, v, starts, lengths, impl=impl)
    whole = [
        torch.cat([prefix.expand(len(q), -1, -1, -1), own], dim=2)
        for prefix, own in ((prefix_k, k), (prefix_v, v))
    ]
    first = starts.new_zeros(*starts.shape[:2], 1)
    plain = replace(
        problem,
        k=whole[0],
        v=whole[1],
        starts=torch.cat([first, starts + prefix_rows], dim=-1),
        lengths=torch.cat([first + prefix_rows, lengths], dim=-1),
    )
    plain.check(result)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
@examples(15)
@given(problem=problems(dtypes=DTYPES))
def test_rows_that_no_range_selects_never_reach_the_output(impl, poison, problem):
    lists, kv_heads = problem.starts.shape[1], problem.k.shape[1]
    used = problem.selected().unflatten(1, (kv_heads, lists // kv_heads)).any(2)
    k, v = (x.masked_fill(~used[..., None], poison) for x in (problem.k, problem.v))
    poisoned = replace(problem, k=k, v=v).attend(impl)
    for x, y in zip(problem.attend(impl), poisoned, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("impl", IMPLS)
@examples(15)
@given(problem=problems(dtypes=DTYPES))
def test_empty_rows_are_zero_and_minus_infinity(impl, problem):
    out, lse = problem.attend(impl)
    per_list = problem.q.shape[1] // problem.starts.shape[1]
    empty = (problem.lengths.sum(-1) == 0).repeat_interleave(per_list, 1)
    assert (out[empty] == 0).all()
    assert (lse[empty] == -torch.inf).all()
    assert torch.isfinite(out).all()
    assert torch.isfinite(lse[~empty]).all()
