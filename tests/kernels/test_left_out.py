"""What a choice tells of rows that it scored and did not choose."""

import os

import pytest
import torch

from saap.kernels.codes import decode, encode, select_rows
from saap.kernels.codes.reference import rounded

from .code_cases import rows

CAN_TRITON = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
NO_TRITON = pytest.mark.skipif(not CAN_TRITON, reason="test_triton_interpreter runs it")
IMPLS = ["reference", "numba", pytest.param("triton", marks=NO_TRITON)]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def coded(n):
    importance = torch.linspace(2.0, 0.1, 64).expand(1, 2, -1)
    return encode(random(1, 2, n, 64), importance)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize(
    ("n", "min_weight", "share"),
    [(30, None, "head"), (30, 0.004, "group"), (1500, None, "group"), (1500, 0.004, "head")],
)
def test_what_is_left_out_is_told_of_each_head(impl, equal, n, min_weight, share):
    """Also of rows that are equal to chosen ones."""
    codes = coded(n)
    if equal:
        for part, rows_at in ((codes.coarse, 3), (codes.fine, 2), (codes.scale, 2)):
            part.copy_(part.narrow(rows_at, 0, 1).clone().expand_as(part))
    q = random(1, 6, 64, seed=1) * torch.tensor([0.2, 1.0, 5.0]).repeat(2)[:, None]
    left_out, outside = torch.full((1, 6), torch.nan), random(1, 6, seed=2) + 5
    chosen = select_rows(
        q, codes, [n], max_tokens=20, n_candidates=n, min_weight=min_weight, outside=outside,
        share=share, left_out=left_out, impl=impl,
    )  # fmt: skip
    heads = 2 if share == "group" else 6
    scores = rounded(q.unflatten(1, (2, 3)), whole=True)[0] @ decode(codes)[0].mT
    scores = scores.view(heads, -1, n)
    nothing = scores.logsumexp(-1).flatten()[None] - 60
    for h in range(heads):
        own = rows(chosen, 0, h)
        assert min_weight is not None or len(own) == 20
        scores[h][:, own] = -torch.inf
    expected = scores.logsumexp(-1).flatten()[None]
    pair = (own.maximum(nothing) for own in (left_out, expected))
    torch.testing.assert_close(*pair, atol=2e-3, rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_of_candidates_only(impl):
    """Rows whose whole codes were not read are not told of; where all are chosen, none is left."""
    n, n_candidates = 1500, 100
    codes, q = coded(n), random(1, 6, 64, seed=1)
    left_out, scored = torch.full((1, 6), torch.nan), torch.zeros(1, 2, dtype=torch.int64)
    options = {"n_candidates": n_candidates, "left_out": left_out, "scored": scored, "impl": impl}
    select_rows(q, codes, [n], max_tokens=20, **options)
    every = (rounded(q.unflatten(1, (2, 3)), whole=True)[0] @ decode(codes)[0].mT).flatten(0, 1)
    assert (left_out[0] < every.logsumexp(-1)).all()
    for h in range(6):
        least, most = (
            every[h].sort().values[part].logsumexp(-1)
            for part in (slice(0, int(scored[0, h // 3]) - 20), slice(-int(scored[0, h // 3]), n))
        )
        assert least < left_out[0, h] < most
    select_rows(q, codes, [n], max_tokens=n, **options)
    assert (left_out == -torch.inf).all()
    select_rows(q, codes, [n], max_tokens=0, **options)
    assert (left_out == -torch.inf).all()
    assert (scored == 0).all()


def test_where_it_is_written_is_checked():
    codes, q = coded(30), random(1, 6, 64)
    for wrong in (torch.zeros(1, 2), torch.zeros(1, 6).double(), torch.zeros(1, 12)[:, ::2]):
        with pytest.raises(ValueError, match=r"left_out must be float32 \[1, 6\] on cpu, contig"):
            select_rows(q, codes, [30], max_tokens=3, n_candidates=3, left_out=wrong)
