"""A model on a GPU, against the same on the CPU: every method, and every way to generate."""

import pytest
import torch

import saap
from saap.budget import Budget
from saap.kernels.attention import attend_ranges, dequantize_rows
from saap.kv import KVStore
from saap.methods import find_method
from saap.selector import LayerInfo

from . import device_cases as cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("method", cases.METHODS_WITHOUT_INDEX)
def test_every_method_gives_what_it_gives_on_the_cpu(method):
    """Scores are rounded differently, so a row on the edge may be another, which changes the
    logits of that step by tenths; where all rows are others, those of every step."""
    model = cases.tiny_model(peaked=16.0)
    expected, found = cases.on_each(
        model, lambda device: cases.logits_of_steps(model, method, device), "cuda"
    )
    off = (found - expected).abs().flatten(1).amax(1)
    assert off.median() < 1e-3, off


@pytest.mark.parametrize("variant", [v for v in cases.VARIANTS if v != "int8 rows"])
def test_generates_what_it_generates_on_the_cpu(variant):
    model = cases.tiny_model()
    expected, found = cases.on_each(
        model, lambda device: cases.generated(model, variant, device), "cuda"
    )
    assert torch.equal(found, expected)


def test_goes_on_from_a_saved_context(tmp_path):
    model = cases.tiny_model()
    expected, found = cases.on_each(
        model,
        lambda device: cases.generated_after_saving(
            model, device, tmp_path / f"{torch.device(device).type}.safetensors"
        ),
        "cuda",
    )
    assert torch.equal(found, expected)


def store_of(n: int, dtype, budget: Budget, **options):
    draw = torch.Generator("cuda").manual_seed(0)
    layer = LayerInfo(64**-0.5, device="cuda")
    store = KVStore(find_method("saap")(None).selector(layer), budget, **options)

    def add(length):
        q = torch.randn(1, 8, length, 64, generator=draw, device="cuda", dtype=dtype)
        k, v = torch.randn(2, 1, 2, length, 64, generator=draw, device="cuda", dtype=dtype)
        store.append(k, v, k)
        return q

    store.attend(q := add(n), q)
    return store, add


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_steps_replayed_are_steps(dtype):
    """Choice and attention are replayed from graphs, over several flushes."""
    store, add = store_of(6000, dtype, Budget(max_tokens=256, window=64, flush_every=16))
    other, add_other = store_of(6000, dtype, Budget(max_tokens=256, window=64, flush_every=16))
    for _ in range(50):
        q, same = add(1), add_other(1)
        found = store.attend(q, q)
        other._steps.moved()  # never the same work twice: nothing is replayed
        other.selector._choice = None
        expected = other.attend(same, same)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_int8_rows_are_read_as_what_they_stand_for(dtype):
    budget = Budget(max_tokens=256, window=64, flush_every=16)
    store, add = store_of(6000, dtype, budget, kv_dtype=torch.int8)
    other, add_other = store_of(6000, dtype, budget, kv_dtype=torch.int8)
    for _ in range(40):
        q, same = add(1), add_other(1)
        found = store.attend(q, q)
        starts, lengths = other.select(same[:, :, 0], same[:, :, 0])
        k, v = (dequantize_rows(t.cpu()).double() for t in (other.k, other.v))
        expected = attend_ranges(
            same[:, :, 0].cpu().double(), k, v, starts.cpu(), lengths.cpu(), impl="reference"
        )
        for own, true in zip(found, expected, strict=True):
            error = (own[:, :, 0].cpu().double() - true).abs().max()
            assert error < 8 * torch.finfo(dtype).eps * max(1.0, float(true.abs().max()))


@pytest.mark.bad_input
def test_int8_rows_beside_a_model_of_32_bits_are_refused():
    model = cases.tiny_model().to("cuda")
    with (
        pytest.raises(ValueError, match=r"must be of 16 bits for kv_dtype torch.int8 on cuda"),
        saap.attached(model, kv_dtype=torch.int8),
    ):
        pass


def test_what_a_step_gave_is_not_written_over():
    store, add = store_of(3000, torch.bfloat16, Budget(max_tokens=128, window=64, flush_every=64))
    given = [store.attend(q := add(1), q)[0] for _ in range(8)]
    copies = [out.clone() for out in given]
    for _ in range(8):
        store.attend(q := add(1), q)
    assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True))
