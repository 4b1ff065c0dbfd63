"""Keys and values stored narrower than the model computes."""

import copy

import pytest
import torch

import saap
from saap import Budget, KVStore, LayerInfo
from saap.hf import over
from saap.kernels.attention.int8_rows import head_dim, quantize_rows, stored_as, widened, width
from saap.kv.chunks import attend_chunk
from saap.methods import METHODS, find_method

NARROW = (torch.bfloat16, torch.float16, torch.int8)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(("past", "new"), [(0, 40), (100, 5), (5000, 40)])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_a_chunk_is_exact_over_what_is_stored(dtype, past, new, softcap):
    torch.manual_seed(past)
    q = torch.randn(1, 4, new, 32)
    k, v = stored_as(torch.randn(2, 1, 2, past + new, 32), dtype)
    options = {"sm_scale": 0.2, "softcap": softcap}
    expected = attend_chunk(q.double(), *(widened(t, torch.float64) for t in (k, v)), **options)
    found = attend_chunk(q, k, v, **options)
    for own, wanted in zip(found, expected, strict=True):
        assert (own - wanted).abs().max() < 64 * torch.finfo(torch.float32).eps * 8


@pytest.mark.parametrize("dtype", NARROW)
def test_a_step_is_exact_over_what_is_stored_and_takes_fewer_bytes(dtype):
    torch.manual_seed(0)
    narrow, whole = (
        KVStore(
            find_method("saap")().selector(LayerInfo(sm_scale=0.25)),
            Budget(max_tokens=64),
            kv_dtype=d,
        )
        for d in (dtype, None)
    )
    for length in (900, 300, 1, 1, 1):
        k, v = torch.randn(2, 1, 2, length, 32)
        q = torch.randn(1, 4, length, 32)
        stored_k, stored_v = (widened(stored_as(t, dtype), torch.float32) for t in (k, v))
        narrow.append(k, v, k)
        whole.append(stored_k, stored_v, stored_k)
        own, expected = (store.attend(q, q) for store in (narrow, whole))
        for found, wanted in zip(own, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert narrow.k.dtype == dtype
    assert narrow.visited_rows == whole.visited_rows < 500
    assert narrow.k.nbytes * 4 * 32 == whole.k.nbytes * width(32, dtype) * dtype.itemsize
    assert narrow.bytes_read < whole.bytes_read


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_decodes_over_narrow_rows(tiny_model, tiny_index, tiny_tokens, name, dtype):
    index = tiny_index if find_method(name).needs_index else None
    budget = Budget(max_tokens=64, n_sink=4, window=16)
    if "max_tokens" not in find_method(name).bounds:
        budget = Budget(nprobe=4, n_sink=4, window=16)
    with saap.attached(tiny_model, index, budget, method=name, kv_dtype=dtype) as attached:
        cache = attached.cache()
        found = tiny_model.generate(
            tiny_tokens[:2], **over(cache), max_new_tokens=12, do_sample=False
        )
    assert found.shape == (2, 312)
    assert all(layer.store.k.dtype == dtype for layer in cache.saap_layers)


@pytest.mark.parametrize("dtype", NARROW)
def test_the_reference_model_says_the_same(reference_model, captured, reference_tokenizer, dtype):
    """Mean difference of log-probabilities at the next token: 0.0061, 0.0007, 0.0101 measured."""
    from saap.eval import reference
    from saap.eval.tasks.answering import encode

    text = reference.split_held_out()[1]
    tokens = encode(reference_tokenizer, text[:2400])[None, :2000]
    logits = []
    for kv_dtype in (None, dtype):
        budget = Budget(max_tokens=128, n_sink=16, window=64)
        with saap.attached(reference_model, budget=budget, kv_dtype=kv_dtype) as attached:
            cache = attached.cache()
            with torch.no_grad():
                reference_model(tokens[:, :-16], **over(cache))
                steps = [
                    reference_model(tokens[:, n : n + 1], **over(cache)).logits[0, -1]
                    for n in range(tokens.shape[1] - 16, tokens.shape[1])
                ]
        logits.append(torch.stack(steps).log_softmax(-1))
    error = (logits[0] - logits[1]).abs()
    likely = logits[0] > -6
    most = {torch.bfloat16: 0.02, torch.float16: 0.003, torch.int8: 0.02}
    assert 0 < error[likely].mean() < most[dtype]


@pytest.mark.parametrize("dtype", NARROW)
def test_a_context_is_saved_as_narrow_as_it_is_held(tiny_model, tiny_tokens, tmp_path, dtype):
    path = tmp_path / "context"
    budget = Budget(max_tokens=32, n_sink=4, window=16)
    sizes = {}
    for kv_dtype in (None, dtype):
        with saap.attached(
            tiny_model, method="saap", budget=budget, kv_dtype=kv_dtype
        ) as attached:
            cache = attached.cache()
            with torch.no_grad():
                tiny_model(tiny_tokens[:1], **over(cache))
                attached.save_context(cache, tiny_tokens[0], path)
                sizes[kv_dtype] = path.stat().st_size
                opened, _ = attached.open_context(path)
                assert opened.layers[0].store.k.dtype == (kv_dtype or torch.float32)
                own, again = (
                    tiny_model(tiny_tokens[1:2, :1], **over(c)).logits for c in (cache, opened)
                )
                assert torch.equal(own, again)
    assert sizes[dtype] < 0.7 * sizes[None]
    with (
        saap.attached(tiny_model, budget=budget) as attached,
        pytest.raises(ValueError, match=rf"kv_dtype is '?{str(dtype)[6:]}'?, not None"),
    ):
        attached.open_context(path)


@pytest.mark.bad_input
def test_the_model_s_own_dtype_is_that_of_none(tiny_model, tiny_tokens, tmp_path):
    path = tmp_path / "context"
    budget = Budget(max_tokens=32, n_sink=4, window=16)
    with saap.attached(tiny_model, budget=budget, kv_dtype=torch.float32) as attached:
        cache = attached.cache()
        with torch.no_grad():
            tiny_model(tiny_tokens[:1], **over(cache))
        attached.save_context(cache, tiny_tokens[0], path)
    with saap.attached(tiny_model, budget=budget) as attached:
        cache, _ = attached.open_context(path)
    assert cache.lengths == [tiny_tokens.shape[1]]


def test_what_is_refused(tiny_model):
    narrow = copy.deepcopy(tiny_model).to(torch.bfloat16)  # others use the fixture, too
    budget = Budget(max_tokens=32)
    with pytest.raises(ValueError, match=r"kv_dtype must be None or one of .*; got torch.uint8"):
        KVStore(None, budget, kv_dtype=torch.uint8)
    with (
        pytest.raises(
            ValueError, match=r"no wider than the model's torch.bfloat16; got torch.float32"
        ),
        saap.attached(narrow, budget=budget, kv_dtype=torch.float32),
    ):
        pass
    k = torch.full((1, 2, 3, 16), 1e5)
    store = KVStore(None, budget, kv_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"k_rope must be within 65504 .*; got 100000"):
        store.append(k, k, k)
    assert store.length == 0
    store = KVStore(None, budget, kv_dtype=torch.int8)
    with pytest.raises(ValueError, match=r"must hold floats to be searched .*; got .*int8"):
        store.as_index()


def test_room_is_made_for_rows_as_they_will_be_stored():
    store = KVStore(None, Budget(max_tokens=32), kv_dtype=torch.int8)
    k = torch.randn(1, 2, 3, 16)
    store.reserve(100, like=k)
    assert store.k.dtype == torch.int8
    assert head_dim(store.k) == 16
    store.append(k, k, k)
    assert torch.equal(store.k[:, :, :3], quantize_rows(k))
