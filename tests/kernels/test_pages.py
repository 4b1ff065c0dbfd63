"""Choice of pages by codes: the plain form and the compiled one code and choose alike."""

import pytest
import torch

from saap.kernels.pages import PageCodes, encode_rows, rotation, select_pages, select_rows
from saap.kernels.pages.layout import decode

from .page_cases import case

ENDS = {"sink_pages": 1, "window_pages": 2}


def chosen(impl, own, keep, **options):
    q, codes, table, lens, _ = own
    out = torch.full((len(q) * codes.kv_heads, max(keep)), -1, dtype=torch.int32)
    keep = torch.tensor(keep, dtype=torch.int32)
    q = q @ rotation(codes.dim) * 0.2
    return select_pages(q, codes, table, lens, keep, out=out, impl=impl, **(ENDS | options))


@pytest.mark.parametrize("group", [1, 3, 5])
@pytest.mark.parametrize(("dim", "rows"), [(64, 32), (80, 64), (8, 32), (128, 128)])
def test_both_choose_the_same(group, dim, rows):
    own = case([2700, 33, 1, 612], group=group, dim=dim, rows=rows)
    keep = [-(-n // rows) // 3 + 3 for n in own[3].tolist()]
    assert torch.equal(chosen("reference", own, keep), chosen("numba", own, keep))


@pytest.mark.parametrize("dim", [32, 64, 80])
def test_both_code_alike(dim):
    plain, compiled = (case([300], dim=dim, impl=impl)[1] for impl in ("reference", "numba"))
    # A coordinate halfway between two codes may be rounded either way.
    assert (decode(plain) - decode(compiled)).abs().gt(1e-4).float().mean() < 1e-3


def test_codes_are_near_the_keys():
    """With 16 levels the error of normal variables has a variance of 1.15 %."""
    _, codes, _, _, keys = case([640], dim=128)
    rotated = (keys @ rotation(128)).view(codes.pages, codes.rows, 2, 128).transpose(1, 2)
    error = (decode(codes) - rotated).square().mean() / rotated.square().mean()
    assert error < 0.02, error  # 0.012 measured


def test_a_code_lies_where_its_key_lies():
    codes = PageCodes.empty(4, 2, 32, 64)
    before = codes.words.clone()
    keys = torch.randn(3, 2, 64)
    encode_rows(keys, torch.tensor([70, -1, 5]), codes, impl="numba")
    changed = (codes.words != before).any(2).any(1).nonzero().tolist()
    assert changed == [[0, 5], [2, 6]]


def test_all_pages_are_the_block_table():
    own = case([100, 64])
    found = chosen("numba", own, [4, 9])
    for r, n in enumerate((4, 2)):
        for h in range(2):
            assert found[2 * r + h].tolist()[:n] == (own[2][r, :n] * 2 + h).tolist()
            assert (found[2 * r + h][n:] == -1).all()


@pytest.mark.parametrize("impl", ["reference", "numba"])
def test_the_page_of_a_needle_and_both_ends_are_visited(impl):
    q, codes, table, lens, _ = case([655], group=1)
    for h in range(2):
        keys = torch.zeros(1, 2, 64)
        keys[0, h] = 5 * q[0, h]
        kept = codes.words.clone(), codes.scales.clone()
        encode_rows(keys @ rotation(64), table[0, 7:8].long() * 32 + 5, codes)
        other = 1 - h
        place = int(table[0, 7])
        codes.words[place, other], codes.scales[place, other] = (t[place, other] for t in kept)
    found = chosen(impl, (q, codes, table, lens, None), [4])
    for h in range(2):
        expected = [int(table[0, page]) * 2 + h for page in (0, 7, 19, 20)]
        assert found[h].tolist() == expected


@pytest.mark.parametrize("impl", ["reference", "numba"])
def test_rows_behind_the_last_token_do_not_count(impl):
    own = case([650])
    before = chosen(impl, own, [6])
    codes, last = own[1], int(own[2][0, 20])
    codes.scales[last, :, 650 % 32 :] = 1e6
    assert torch.equal(chosen(impl, own, [6]), before)


@pytest.mark.parametrize("impl", ["reference", "numba"])
def test_a_query_of_nan_breaks_nothing(impl):
    q, *rest = case([650])
    q[0, 1, 3] = torch.nan
    found = chosen(impl, (q, *rest), [6])
    assert ((found >= 0) & (found < rest[0].pages * 2)).all()


def test_keys_that_are_not_finite_count_as_zero_there():
    keys = torch.randn(1, 1, 64)
    keys[0, 0, 3] = torch.inf
    for impl in ("reference", "numba"):
        codes = PageCodes.empty(1, 1, 32, 64)
        encode_rows(keys, torch.tensor([0]), codes, impl=impl)
        assert decode(codes).isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": [1]}, "keep must be at least 3"),
        ({"keep": [60], "room": 9}, "out must have room for 21 pages"),
        ({"sink_pages": -1}, "sink_pages must be at least 0"),
        ({"lens": 900}, "seq_lens must be in 1..672"),
        ({"page": 99}, "block_table must hold pages in 0..23"),
        ({"dtype": torch.float64}, "q must be float32"),
        ({"impl": "triton"}, "impl must be None or one of"),
    ],
)
@pytest.mark.bad_input
def test_bad_input(change, message):
    q, codes, table, lens, _ = case([655])
    if "lens" in change:
        lens = torch.tensor([change["lens"]], dtype=torch.int32)
    if "page" in change:
        table[0, 3] = change["page"]
    keep = change.get("keep", [6])
    out = torch.zeros(2, change.get("room", max(keep)), dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        select_pages(
            q.to(change.get("dtype", torch.float32)), codes, table, lens,
            torch.tensor(keep, dtype=torch.int32), out=out, window_pages=2,
            sink_pages=change.get("sink_pages", 1), impl=change.get("impl"),
        )  # fmt: skip


@pytest.mark.bad_input
def test_slots_behind_the_last_page_are_refused():
    codes = PageCodes.empty(4, 2, 32, 64)
    with pytest.raises(ValueError, match="slots must be below 128; got 128"):
        encode_rows(torch.randn(1, 2, 64), torch.tensor([128]), codes)
    assert not codes.words.any()


@pytest.mark.bad_input
def test_a_dim_that_fills_no_words_is_refused():
    with pytest.raises(ValueError, match="dim must be a multiple of 8; got 12"):
        PageCodes.empty(1, 1, 32, 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 5}, "keep must be at least 13; got 5"),
        ({"room": 30}, "out must have room for 40 rows; got 30"),
        ({"sinks": -1}, "sinks must be at least 0; got -1"),
        ({"window": 0}, "window must be at least 1; got 0"),
        ({"page_stride": 31}, "page_stride must be at least 32; got 31"),
        ({"page_stride": 2**30}, r"pages \* page_stride must be below 2\*\*31; got 24"),
        ({"most": 673}, "most must be at most 672"),
        ({"most": 600}, r"seq_lens must be in 0\.\.600; got 655"),
        ({"page": 99}, r"block_table must hold pages in 0\.\.23"),
        ({"dtype": torch.float64}, "q must be float32"),
        ({"impl": "numba"}, "impl must be None or one of reference, triton; got 'numba'"),
        ({"impl": "triton"}, "impl 'triton' needs a CUDA device; got tensors on cpu"),
    ],
)
@pytest.mark.bad_input
def test_bad_input_of_rows(change, message):
    q, codes, table, lens, _ = case([655])
    if "page" in change:
        table[0, 3] = change.pop("page")
    keep = torch.tensor([change.pop("keep", 40)], dtype=torch.int32)
    out = tuple(torch.zeros(2, 1, 2, change.pop("room", 40), dtype=torch.int32))
    if change.get("impl") == "triton":
        pages = pytest.importorskip("saap.kernels.pages.triton")
        if pages.INTERPRETED or torch.cuda.is_available():
            pytest.skip("the interpreter takes tensors of the CPU")
    options = {"sinks": 4, "window": 9, "page_stride": 32, "most": 672, "impl": None}
    q = q.to(change.pop("dtype", torch.float32))
    with pytest.raises(ValueError, match=message):
        select_rows(q, codes, table, lens, keep, out=out, **(options | change))
    assert not out[0].any()
