"""Rows chosen in a paged cache: Triton against the plain form; run where `triton_cases` says."""

import pytest
import torch

from saap.kernels.attention import attend_ranges
from saap.kernels.pages import encode_rows, rotation, select_rows
from saap.kernels.pages import triton as backend
from saap.kernels.pages.layout import decode

from .page_cases import case, rows_of
from .triton_cases import DEVICE, MARKS

pytestmark = MARKS

ENDS = {"sinks": 4, "window": 9}


def chosen(impl, own, keep, *, page_stride=None, most=None, scale=0.2, **options):
    q, codes, table, lens, _ = own
    keep = torch.tensor(keep, dtype=torch.int32, device=DEVICE)
    shape = len(q), codes.kv_heads, max(1, int(keep.max()))
    out = tuple(torch.full((2, *shape), -1, dtype=torch.int32, device=DEVICE))
    q = q @ rotation(codes.dim).to(DEVICE) * scale
    return select_rows(
        q, codes, table, lens, keep, page_stride=page_stride or codes.rows,
        most=most or table.shape[1] * codes.rows, out=out, impl=impl, **(ENDS | options),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("dim", "rows", "group", "stride"),
    [(64, 32, 1, None), (128, 16, 4, None), (80, 16, 5, 48), (256, 32, 2, 64)],
)
def test_chooses_as_the_reference(dim, rows, group, stride):
    lens, keep = [1400, 33, 1, 0, 260], [100, 20, 13, 0, 10**6]
    own = case(lens, group=group, dim=dim, rows=rows, impl="reference", device=DEVICE)
    keep[4] = 260
    ours, plain = (chosen(i, own, keep, page_stride=stride) for i in ("triton", "reference"))
    for r, n in enumerate(lens):
        for h in range(2):
            found, expected = rows_of(ours, r, h), rows_of(plain, r, h)
            assert len(found) == len(set(found)) == min(n, keep[r])
            assert len(set(found) - set(expected)) <= 1  # rounding of two weights that are alike


def test_all_rows_are_the_block_table():
    own = case([100, 64], impl="reference", device=DEVICE)
    found = chosen("triton", own, [100, 90], page_stride=70)
    for r, n in enumerate((100, 64)):
        for h in range(2):
            pages = own[2][r].tolist()
            assert rows_of(found, r, h) == [pages[i // 32] * 70 + i % 32 for i in range(n)]


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_needle_and_both_ends_are_visited(impl):
    q, codes, table, lens, _ = case([655], group=1, impl="reference", device=DEVICE)
    slot = table[0, 7:8].long() * 32 + 5
    encode_rows((5 * q[0])[None] @ rotation(64).to(DEVICE), slot, codes, impl="reference")
    found = chosen(impl, (q, codes, table, lens, None), [14])
    pages = table[0].tolist()
    at_ends = [pages[i // 32] * 32 + i % 32 for i in (*range(4), *range(646, 655))]
    for h in range(2):
        assert set(rows_of(found, 0, h)) == {*at_ends, int(slot)}


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_rows_behind_the_last_token_do_not_count(impl):
    own = case([650], impl="reference", device=DEVICE)
    before = [t.clone() for t in chosen(impl, own, [40])]
    codes, last = own[1], int(own[2][0, 20])
    codes.scales[last, :, 650 % 32 :] = 1e6
    for a, b in zip(chosen(impl, own, [40]), before, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_query_that_is_not_finite_breaks_nothing(value):
    q, *rest = case([650], impl="reference", device=DEVICE)
    q[0, 1, 3] = value
    found = chosen("triton", (q, *rest), [40])
    for h in range(2):
        assert len(set(rows_of(found, 0, h))) == 40


@pytest.mark.parametrize("dim", [32, 64, 80])
def test_codes_as_the_reference(dim):
    own, plain = (
        case([300], dim=dim, impl=impl, device=DEVICE)[1] for impl in ("triton", "reference")
    )
    # A coordinate halfway between two codes may be rounded either way.
    assert (decode(own) - decode(plain)).abs().gt(1e-4).float().mean() < 1e-3


def test_a_slot_below_zero_and_keys_that_are_not_finite():
    codes = case([90], impl="reference", device=DEVICE)[1]
    before, keys = codes.words.clone(), torch.randn(3, 2, 64, device=DEVICE)
    keys[0, 0, 3], keys[0, 1, 4] = torch.nan, torch.inf
    encode_rows(keys, torch.tensor([70, -1, 5], device=DEVICE), codes, impl="triton")
    changed = (codes.words != before).any(2).any(1).nonzero().tolist()
    assert changed == [[0, 5], [2, 6]]
    assert decode(codes).isfinite().all()


def test_requests_that_need_much_memory_are_done_in_turn(monkeypatch):
    own = case([500, 400, 300], impl="reference", device=DEVICE)
    whole = [t.clone() for t in chosen("triton", own, [60, 50, 40])]
    monkeypatch.setattr(backend, "WORKSPACE", 4 * 512 * 8)
    for a, b in zip(chosen("triton", own, [60, 50, 40]), whole, strict=True):
        assert torch.equal(a, b)


def test_attention_over_the_chosen_rows_of_a_packed_cache():
    """Keys and values side by side, heads before tokens or after: read in place."""
    own = case([300, 77], dim=64, rows=16, impl="reference", device=DEVICE)
    q, codes, table, _, keys = own
    keys = keys.to(DEVICE).view(codes.pages, 16, 2, 64)
    for heads_first in (True, False):
        shape = (codes.pages, 2, 16, 128) if heads_first else (codes.pages, 16, 2, 128)
        cache = torch.randn(shape, device=DEVICE)
        cache = cache if heads_first else cache.transpose(1, 2)
        cache[..., :64] = keys.transpose(1, 2)
        stride = cache.stride(0) // cache.stride(2)
        starts, lengths = chosen("triton", own, [300, 77], page_stride=stride)
        rows = (codes.pages - 1) * stride + 16
        strides = 0, cache.stride(1), cache.stride(2), 1
        k = cache.as_strided((2, 2, rows, 64), strides)
        v = cache.as_strided((2, 2, rows, 64), strides, cache.storage_offset() + 64)
        out, _ = attend_ranges(q, k, v, starts, lengths, impl="triton")
        for r, n in enumerate((300, 77)):
            pages = cache[table[r, : -(-n // 16)].long()].transpose(1, 2).flatten(0, 1)[:n]
            own_k, own_v = (x.double() for x in pages.split(64, -1))
            scores = torch.einsum("hgd,nhd->hgn", q[r].double().view(2, 3, 64), own_k) / 8
            expected = torch.einsum("hgn,nhd->hgd", scores.softmax(-1), own_v).flatten(0, 1)
            torch.testing.assert_close(out[r].double(), expected, atol=1e-5, rtol=1e-5)
