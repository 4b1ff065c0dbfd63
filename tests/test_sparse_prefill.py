"""Prompts that are read within a budget: what is attended is exact, causal, counted and chosen."""

import copy
import re

import pytest
import torch

import saap
from saap import Budget, KVStore, LayerInfo, PrefillBudget
from saap.hf import over
from saap.kernels.attention import merge_states
from saap.kv.chunks import attend_chunk
from saap.kv.sparse_chunks import RowsRead, attend_sparse_chunk
from saap.methods import find_method

from .test_generate import generated, make, prompt, random_index

LAYOUT = {"n_sink": 3, "window": 20}
SPARSE = PrefillBudget(visited=0.3, exact_last=5, dense_below=40, block=32)
STORE = Budget(max_tokens=8, n_sink=2, window=8, flush_every=8)
WHOLE = PrefillBudget(visited=1.0, exact_last=0, dense_below=0, block=16)
TIGHT = PrefillBudget(visited=0.2, exact_last=3, dense_below=0, block=16)


def tensors(n, new, n_kv=2, group=3, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = 2 * torch.randn(1, n_kv * group, new, dim, generator=generator)
    k, v = torch.randn(2, 1, n_kv, n, dim, generator=generator)
    return q, k, v


def visited_by(q, k, budget, sm_scale, softcap=None, n_sink=3, window=20):
    """Which rows each token visits, `[Hkv, T, N]`, by the plain words of the docstrings."""
    n_kv, n, new = k.shape[1], k.shape[2], q.shape[2]
    rows = torch.arange(n)
    causal = rows <= (rows[-new:])[:, None]
    mask = causal.expand(n_kv, -1, -1).clone()
    first = n - new
    while first < n - budget.exact_last:
        last = min(n - budget.exact_last, (first // budget.block + 1) * budget.block)
        most = n if budget.visited is None else -int(-budget.visited * last // 1)
        most = min(most, n if budget.max_tokens is None else budget.max_tokens)
        chosen = most - n_sink - window - (last - first)
        if last > budget.dense_below and first > n_sink + window and most < last:
            own = slice(first - (n - new), last - (n - new))
            for head in range(n_kv):
                queries = q[0].unflatten(0, (n_kv, -1))[head, :, own].double()
                weights = torch.zeros(first)
                for part in queries.split(budget.averaged, 1):
                    scores = part.mean(1) @ k[0, head, :first].double().mT * sm_scale
                    if softcap is not None:
                        scores = softcap * torch.tanh(scores / softcap)
                    weights += scores.softmax(-1).sum(0)
                middle = weights[n_sink : first - window]
                best = middle.topk(min(max(0, chosen), len(middle))).indices + n_sink
                seen = torch.zeros(n, dtype=torch.bool)
                seen[:n_sink] = seen[first - window :] = seen[best] = True
                mask[head, own] &= seen
        first = last
    return mask


def attended(q, k, v, mask, sm_scale, softcap=None):
    q, k, v = (t.double() for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    scores = q.unflatten(1, (-1, group)) @ k.unsqueeze(2).mT * sm_scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask[None, :, None], -torch.inf)
    return (scores.softmax(-1) @ v.unsqueeze(2)).flatten(1, 2), scores.logsumexp(-1).flatten(1, 2)


@pytest.mark.parametrize(("n", "new"), [(300, 300), (300, 77), (333, 200), (200, 6), (97, 97)])
@pytest.mark.parametrize(
    "budget",
    [
        SPARSE,
        PrefillBudget(visited=0.9, exact_last=0, dense_below=0, block=48, averaged=5),
        PrefillBudget(max_tokens=90, exact_last=7, dense_below=130, block=32),
        PrefillBudget(visited=0.5, max_tokens=10, exact_last=0, dense_below=0, block=16),
    ],
)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_it_is_exact_attention_over_the_rows_that_are_told(n, new, budget, softcap):
    q, k, v = tensors(n, new)
    options = {"sm_scale": 0.3, "softcap": softcap}
    mask = visited_by(q, k, budget, 0.3, softcap)
    expected = attended(q, k, v, mask, 0.3, softcap)
    read = RowsRead()
    found = attend_sparse_chunk(q, k, v, budget, **LAYOUT, **options, read=read)
    for own, wanted in zip(found, expected, strict=True):
        assert (own - wanted).abs().max() < 64 * torch.finfo(torch.float32).eps
    assert read.visited == mask[0].sum() == mask[1].sum()
    assert read.seen == sum(range(n - new + 1, n + 1))


def test_the_budget_is_kept():
    n = 1000
    q, k, v = tensors(n, n)
    for budget, most in ((0.2, None), (0.5, None), (None, 100), (0.4, 150)):
        own = PrefillBudget(visited=budget, max_tokens=most, exact_last=0, dense_below=0, block=16)
        mask = visited_by(q, k, own, 0.3)[0]
        always = LAYOUT["n_sink"] + LAYOUT["window"] + 16
        for token, rows in enumerate(mask.sum(1).tolist()):
            end = (token // 16 + 1) * 16
            allowed = min(most or n, -int(-(budget or 1) * end // 1))
            assert rows <= max(always, allowed)
        read = RowsRead()
        attend_sparse_chunk(q, k, v, own, **LAYOUT, sm_scale=0.3, read=read)
        assert read.visited == mask.sum()
        assert read.share < 0.6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrower_rows_are_attended_as_they_are_stored(dtype):
    q, k, v = tensors(300, 150)
    k, v = k.to(dtype), v.to(dtype)
    found = attend_sparse_chunk(q, k, v, SPARSE, **LAYOUT, sm_scale=0.3)
    wide = attend_sparse_chunk(q, k.float(), v.float(), SPARSE, **LAYOUT, sm_scale=0.3)
    for own, wanted in zip(found, wide, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", [200, 300])
def test_a_later_token_changes_nothing_before_its_block_and_no_value_comes_early(place):
    n = 320
    q, k, v = tensors(n, n)
    options = {**LAYOUT, "sm_scale": 0.3}
    budget = PrefillBudget(visited=0.3, exact_last=0, dense_below=0, block=32)
    before = attend_sparse_chunk(q, k, v, budget, **options)
    keys, values, queries = k.clone(), v.clone(), q.clone()
    for changed in (keys, values):
        changed[:, :, place:] *= 30
    for own, other in zip(
        before, attend_sparse_chunk(q, keys, values, budget, **options), strict=True
    ):
        assert torch.equal(own[:, :, :place], other[:, :, :place])
        assert not torch.equal(own[:, :, place:], other[:, :, place:])
    queries[:, :, place:] += 3
    block = place // 32 * 32
    out, _ = attend_sparse_chunk(queries, keys, values, budget, **options)
    assert torch.equal(out[:, :, :block], before[0][:, :, :block])


def test_blocks_do_not_depend_on_how_a_prompt_was_cut():
    n = 512
    q, k, v = tensors(n, n)
    budget = PrefillBudget(visited=0.25, exact_last=0, dense_below=64, block=32)
    options = {**LAYOUT, "sm_scale": 0.3}
    whole, _ = attend_sparse_chunk(q, k, v, budget, **options)
    for first, last in ((0, 160), (160, 192), (192, 512)):
        own = (q[:, :, first:last], k[:, :, :last], v[:, :, :last])
        part, _ = attend_sparse_chunk(*own, budget, **options)
        torch.testing.assert_close(part, whole[:, :, first:last], rtol=1e-5, atol=1e-5)


def test_the_same_twice():
    q, k, v = tensors(700, 300)
    first, second = (
        attend_sparse_chunk(q, k, v, SPARSE, **LAYOUT, sm_scale=0.3) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_it_finds_the_row_that_one_query_asks_for():
    """A key that one of 32 queries looks up is visited, though the others look elsewhere."""
    q, k, v = tensors(2000, 32, n_kv=1, group=1)
    q *= 0.2
    q[0, 0, 9] = 40 * torch.nn.functional.normalize(k[0, 0, 700], dim=0)
    k[0, 0, 700] *= 3
    budget = PrefillBudget(visited=0.06, exact_last=0, dense_below=0, block=32)
    out, _ = attend_sparse_chunk(q, k, v, budget, **LAYOUT, sm_scale=1.0)
    dense, _ = attend_chunk(q, k, v, sm_scale=1.0)
    torch.testing.assert_close(out[0, 0, 9], dense[0, 0, 9], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(out[0, 0, 8], dense[0, 0, 8], rtol=1e-3, atol=1e-3)


def stores(budget, method="saap", index=None):
    info = LayerInfo(sm_scale=0.3)
    return KVStore(
        None if method is None else find_method(method)(index).selector(info),
        STORE,
        prefill=budget,
    )


def fill(store, lengths, seed=0, batch=1):
    generator = torch.Generator().manual_seed(seed)
    outs = []
    for length in lengths:
        k, v = torch.randn(2, batch, 2, length, 16, generator=generator)
        q = 2 * torch.randn(batch, 4, length, 16, generator=generator)
        store.append(k, v, k)
        outs.append(store.attend(q, q, sm_scale=0.3)[0])
    return outs


def test_a_store_counts_what_chunks_read_and_steps_stay_as_they_are():
    sparse, dense = stores(TIGHT), stores(None)
    own, other = fill(sparse, (200, 1, 100)), fill(dense, (200, 1, 100))
    assert dense.rows_read.share == 1.0
    assert 0.15 < sparse.rows_read.share < 0.5
    assert not torch.allclose(own[0], other[0], atol=1e-3)
    torch.testing.assert_close(own[1], other[1])
    torch.testing.assert_close(own[2][:, :, -3:], other[2][:, :, -3:])


def model_logits(model, tokens, prefill, chunk=None, budget=STORE, mask=None, **options):
    with saap.attached(model, budget=budget, prefill=prefill, **options) as attached:
        cache = attached.cache()
        found, first = [], 0
        with torch.no_grad():
            for part in tokens.split(chunk or tokens.shape[1], 1):
                own = None if mask is None else mask[:, : first + part.shape[1]]
                found.append(model(part, **over(cache), attention_mask=own).logits)
                first += part.shape[1]
        return torch.cat(found, 1), cache


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("chunk", [None, 50])
def test_the_whole_budget_is_dense(family, chunk):
    model, tokens = make(family), prompt(1, 150)
    with torch.no_grad():
        expected = model(tokens).logits
    for budget in (WHOLE, PrefillBudget(max_tokens=150, dense_below=0, block=16)):
        found, cache = model_logits(model, tokens, budget, chunk)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert cache.read_share == 1.0
    found, cache = model_logits(model, tokens, TIGHT, chunk)
    assert not torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert cache.read_share < 0.6


def test_a_padded_batch_is_read_as_each_alone():
    model = make("llama")
    long, short = prompt(1, 150), prompt(1, 110, seed=5)
    both = torch.cat([long, torch.nn.functional.pad(short, (40, 0))])
    mask = torch.ones_like(both)
    mask[1, :40] = 0
    found, cache = model_logits(model, both, TIGHT, mask=mask)
    for tokens, own in ((long, found[:1]), (short, found[1:, 40:])):
        alone, _ = model_logits(model, tokens, TIGHT)
        torch.testing.assert_close(own, alone, rtol=1e-4, atol=1e-4)
    assert cache.read_share < 0.6


@pytest.mark.parametrize("method", ["saap", "dense", "blend", "kmeans"])
def test_every_order_of_rows_is_read_alike(method):
    """Lists put rows in other orders; which are visited does not change with that."""
    model, tokens = make("llama"), prompt(1, 200)
    index = random_index(model) if find_method(method).needs_index else None
    found, _ = model_logits(model, tokens, TIGHT, 64, method=method, index=index)
    expected, _ = model_logits(model, tokens, TIGHT, 64, method="dense")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_generate_reads_the_prompt_sparsely_and_short_forwards_exactly():
    model, tokens = make("llama"), prompt(1, 200)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    with saap.attached(model, budget=STORE, prefill=TIGHT) as attached:
        cache = attached.cache()
        found = generated(model, inputs, **over(cache), max_new_tokens=10)
        assert found.shape[1] == 210
        read = copy.copy(cache.saap_layers[0].store.rows_read)
        assert read.share < 0.5
        with torch.no_grad():
            model(tokens[:, :3], **over(cache))
        now = cache.saap_layers[0].store.rows_read
        assert now.visited - read.visited == now.seen - read.seen > 0


def test_dense_layers_and_windows_read_everything():
    model, tokens = make("llama"), prompt(1, 200)
    budget = Budget(max_tokens=8, n_sink=2, window=8, dense_layers=(0,))
    _, cache = model_logits(model, tokens, TIGHT, budget=budget)
    shares = [layer.store.rows_read.share for layer in cache.saap_layers]
    assert shares[0] == 1.0 > shares[1]


def test_a_context_goes_on_sparsely_after_the_file(tmp_path):
    model, tokens = make("llama"), prompt(1, 300)
    index = random_index(model)
    options = {"budget": STORE, "prefill": TIGHT, "method": "blend"}
    expected, _ = model_logits(model, tokens, chunk=150, index=index, **options)
    with saap.attached(model, index, **options) as attached, torch.no_grad():
        first = attached.cache()
        model(tokens[:, :150], **over(first))
        attached.save_context(first, tokens[0, :150], tmp_path / "context.safetensors")
        opened, _ = attached.open_context(tmp_path / "context.safetensors")
        found = model(tokens[:, 150:], **over(opened)).logits
    torch.testing.assert_close(found, expected[:, 150:], rtol=1e-4, atol=1e-4)


def test_a_part_of_a_chunk_merges_as_it_should():
    """Sinks, chosen rows, window and block are disjoint: nothing is counted twice."""
    q, k, v = tensors(400, 100)
    out, lse = attend_sparse_chunk(q, k, v, SPARSE, **LAYOUT, sm_scale=0.3)
    dense, full = attend_chunk(q, k, v, sm_scale=0.3)
    assert (lse <= full + 1e-5).all()
    merged, _ = merge_states(out, lse, torch.zeros_like(out), torch.full_like(lse, -torch.inf))
    torch.testing.assert_close(merged, out)
    torch.testing.assert_close(out[:, :, -5:], dense[:, :, -5:], rtol=1e-5, atol=1e-5)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({}, "one of visited, max_tokens must be set"),
        ({"visited": 0.0}, "visited must be above 0 and at most 1; got 0.0"),
        ({"visited": 1.5}, "at most 1; got 1.5"),
        ({"visited": True}, "got True"),
        ({"visited": "0.1"}, "got '0.1'"),
        ({"visited": float("nan")}, "got nan"),
        ({"max_tokens": -1}, "max_tokens must be an integer in 0.."),
        ({"max_tokens": 1.5}, "got 1.5"),
        ({"visited": 0.1, "exact_last": -3}, "exact_last must be an integer"),
        ({"visited": 0.1, "dense_below": 2**31}, "got 2147483648"),
        ({"visited": 0.1, "block": 8}, "block must be an integer in 16..4096; got 8"),
        ({"visited": 0.1, "block": 64.0}, "got 64.0"),
        ({"visited": 0.1, "averaged": 0}, "averaged must be an integer in 1..4096; got 0"),
    ],
)
def test_a_wrong_budget_is_refused(options, line):
    with pytest.raises(ValueError, match=re.escape(line)) as refused:
        PrefillBudget(**options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"prefill": 0.1}, "prefill must be None or a saap.PrefillBudget; got 0.1"),
        ({"prefill": Budget(max_tokens=5)}, "saap.PrefillBudget; got Budget"),
        ({"prefill": TIGHT, "verify": 8}, "prefill must be None beside verify"),
        ({"prefill": TIGHT, "group": object()}, "split over a group"),
    ],
)
def test_what_it_does_not_go_with_is_refused(tiny_model, options, line):
    refusal = pytest.raises(ValueError, match=re.escape(line))
    with refusal as refused, saap.attached(tiny_model, **options):
        pass
    assert "\n" not in str(refused.value)
