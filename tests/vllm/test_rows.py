"""Decode steps over single rows of vLLM's cache. Needs no vLLM."""

import pytest
import torch

from saap.kernels.pages import PageCodes, encode_rows
from saap.vllm.options import Options
from saap.vllm.rotations import rotation_on
from saap.vllm.rows import attend_rows, in_place, room_for_rows, rows_to_keep

CUDA = torch.cuda.is_available()
LAYERS, HEADS, GROUP, PAGE, DIM = 3, 2, 3, 16, 64
WHOLE = Options(visited=1.0, dense_below=0)

# Orders of layers, blocks, heads and tokens in memory, as vLLM has them.
LAYOUTS = {
    "LBHNC": (0, 1, 2, 3), "LBNHC": (0, 1, 3, 2), "BLHNC": (1, 0, 2, 3), "BLNHC": (1, 0, 3, 2),
    "BHLNC": (1, 2, 0, 3), "LHBNC": (0, 2, 1, 3),
}  # fmt: skip


def cache_of(layout, pages, dtype=torch.float32, device="cpu"):
    """A layer's cache `[pages, Hkv, rows, 2 D]` of random numbers, with other layers beside it."""
    order, sizes = LAYOUTS[layout], (LAYERS, pages, HEADS, PAGE)
    draw = torch.Generator().manual_seed(0)
    held = torch.randn([sizes[i] for i in order] + [2 * DIM], generator=draw)
    held = held.to(device, dtype)
    return held.permute(*(order.index(i) for i in range(4)), 4)[1]


def problem(layout, lens, dtype=torch.float32, device="cpu"):
    pages = [-(-n // PAGE) for n in lens]
    cache = cache_of(layout, sum(pages) + 2, dtype, device)
    draw = torch.Generator().manual_seed(1)
    free = torch.randperm(len(cache), generator=draw).int()
    table = torch.zeros(len(lens), max(pages), dtype=torch.int32)
    for r, n in enumerate(pages):
        table[r, :n], free = free[:n], free[n:]
    codes = PageCodes.empty(len(cache), HEADS, PAGE, DIM, device)
    keys = cache[..., :DIM].transpose(1, 2).flatten(0, 1).float()
    slots = torch.arange(len(keys), device=device)
    encode_rows(keys @ rotation_on(DIM, 1.0, keys.device), slots, codes)
    q = torch.randn(len(lens), HEADS * GROUP, DIM, generator=draw).to(device, dtype)
    return q, cache, codes, table.to(device), torch.tensor(lens, dtype=torch.int32, device=device)


def exact(q, cache, table, n):
    if n == 0:
        return torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    rows = cache[table[: -(-n // PAGE)].long()].transpose(1, 2).flatten(0, 1)[:n]
    k, v = rows.double().split(DIM, -1)
    scores = torch.einsum("hgd,nhd->hgn", q.double().unflatten(0, (HEADS, -1)), k)
    return torch.einsum("hgn,nhd->hgd", (scores * DIM**-0.5).softmax(-1), v).flatten(0, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_rows_are_exact_attention_wherever_they_lie(layout):
    """A place without a request among them, and more room than the longest request needs."""
    lens = [300, 77, 0, 1]
    q, cache, codes, table, own_lens = problem(layout, lens)
    output = torch.full((4, HEADS * GROUP * DIM), torch.nan)
    attend_rows(q, cache, codes, table, own_lens, output, most=304, scale=DIM**-0.5, options=WHOLE)
    for r, n in enumerate(lens):
        expected = exact(q[r], cache, table[r], n).flatten()
        torch.testing.assert_close(output[r].double(), expected, atol=1e-5, rtol=1e-5)


def test_few_rows_hold_most_of_a_peaked_attention():
    q, cache, codes, table, lens = problem("LBNHC", [300, 200])
    for h in range(HEADS):  # a key like the first query of each group, at token 150
        cache[table[:, 150 // PAGE].long(), h, 150 % PAGE, :DIM] = 3 * q[:, h * GROUP]
    keys = cache[..., :DIM].transpose(1, 2).flatten(0, 1)
    encode_rows(keys @ rotation_on(DIM, 1.0, keys.device), torch.arange(len(keys)), codes)
    output = torch.empty_like(q)
    options = Options(visited=0.1, sinks=2, window=8, dense_below=0)
    attend_rows(q, cache, codes, table, lens, output, most=300, scale=DIM**-0.5, options=options)
    for r, n in enumerate((300, 200)):
        expected = exact(q[r], cache, table[r], n)[::GROUP]
        error = (output[r, ::GROUP] - expected).norm() / expected.norm()
        assert error < 0.05, error  # 0.00002 measured; without that row above 1


@pytest.mark.parametrize("visited", [0.003, 0.1, 0.123456, 1.0])
@pytest.mark.parametrize(("sinks", "window", "dense_below"), [(0, 1, 0), (16, 64, 2048)])
def test_there_is_room_for_what_is_kept(visited, sinks, window, dense_below):
    options = Options(visited, sinks, window, dense_below)
    lens = torch.arange(0, 9000, dtype=torch.int32)
    keep = rows_to_keep(lens, options)
    assert keep.dtype == torch.int32
    assert (keep <= lens).all()
    assert (keep >= torch.minimum(lens, (lens * visited - 0.01).int())).all()
    assert torch.equal(keep[: dense_below + 1], lens[: dense_below + 1])
    assert all(int(keep[n]) <= room_for_rows(options, n) for n in range(1, 9000))
    for most in (10**6, 2**27):  # float32 has no such numbers, one by one
        kept = int(rows_to_keep(torch.tensor([most - 1, most], dtype=torch.int32), options).max())
        assert kept <= room_for_rows(options, most)


@pytest.mark.bad_input
def test_a_cache_that_no_view_fits_is_refused():
    whole = torch.zeros(4, 2, PAGE, 2 * DIM + 1)
    with pytest.raises(ValueError, match="side by side"):
        in_place(torch.zeros(4, 2, 2 * DIM, PAGE).transpose(2, 3), 1)
    in_place(whole[..., :-1], 1)  # rows with something between them
    with pytest.raises(ValueError, match="whole rows between pages; got strides"):
        in_place(torch.zeros(4, 2 * PAGE * 2 * DIM + 1)[:, 1:].unflatten(1, (2, PAGE, 2 * DIM)), 1)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_captured_step_serves_other_lengths(dtype):
    """As vLLM does it: captured for the longest context, replayed for whatever comes."""
    lens = [9000, 4000, 2100, 0]
    q, cache, codes, table, own_lens = problem("LBNHC", lens, dtype, "cuda")
    output, options = torch.empty_like(q), Options(visited=0.1, dense_below=2048)
    step = {"most": table.shape[1] * PAGE, "scale": DIM**-0.5, "options": options}
    attend_rows(q, cache, codes, table, own_lens, output, **step)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend_rows(q, cache, codes, table, own_lens, output, **step)
    for fresh in (lens, [3000, 1, 2048, 16], [0, 0, 0, 0]):
        own_lens.copy_(torch.tensor(fresh))
        graph.replay()
        eager = torch.empty_like(q)
        attend_rows(q, cache, codes, table, own_lens, eager, **step)
        assert torch.equal(output, eager)
        for r, n in enumerate(fresh):
            if n <= 2048:  # visited whole
                expected = exact(q[r], cache, table[r], n)
                error = (output[r].double() - expected).abs().max()
                assert error < 16 * torch.finfo(dtype).eps, error
