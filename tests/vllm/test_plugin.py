"""Registration and the plan of a step. Needs vLLM, starts no engine."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed (make vllm)", allow_module_level=True)

from vllm.v1.attention.backends import registry

import saap.vllm
from saap.vllm.checks import exact
from saap.vllm.decode import behind, leading_decodes
from saap.vllm.options import Options
from saap.vllm.plan import pages_to_keep

CPU_ATTN = registry.AttentionBackendEnum.CPU_ATTN
CUSTOM = registry.AttentionBackendEnum.CUSTOM


@pytest.fixture(autouse=True)
def unregistered(monkeypatch):
    monkeypatch.setattr(saap.vllm, "_registered", False)
    yield
    CPU_ATTN.clear_override()
    CUSTOM.clear_override()


@pytest.mark.parametrize("text", ["", "0"])
def test_nothing_is_changed_unless_asked_for(monkeypatch, text):
    monkeypatch.setenv("SAAP_VLLM", text)
    before = CPU_ATTN.get_path()
    saap.vllm.register()
    assert CPU_ATTN.get_path() == before


def test_registered_once_or_more(monkeypatch):
    monkeypatch.setenv("SAAP_VLLM", "1")
    saap.vllm.register()
    saap.vllm.register()
    assert CPU_ATTN.get_path() == "saap.vllm.cpu.SaapCpuBackend"
    assert CPU_ATTN.get_class().get_name() == "CPU_ATTN"


def test_another_version_is_refused_before_anything_is_changed(monkeypatch):
    monkeypatch.setenv("SAAP_VLLM", "1")
    monkeypatch.setattr("vllm.__version__", "0.99.0")
    before = CPU_ATTN.get_path()
    with pytest.raises(ValueError, match=r"SAAP_VLLM needs vLLM 0\.32\.0; got 0\.99\.0"):
        saap.vllm.register()
    assert CPU_ATTN.get_path() == before


def platform(monkeypatch, *, cuda):
    from vllm.platforms import current_platform

    for name, answer in (("is_cpu", False), ("is_cuda", cuda)):
        monkeypatch.setattr(type(current_platform), name, lambda self, answer=answer: answer)


def test_on_cuda_it_is_a_backend_to_choose(monkeypatch):
    import saap.vllm.cuda

    platform(monkeypatch, cuda=True)
    monkeypatch.setenv("SAAP_VLLM", "1")
    before = CPU_ATTN.get_path()
    saap.vllm.register()
    assert CUSTOM.get_class().get_name() == "CUSTOM"
    assert CUSTOM.get_class().get_impl_cls().__name__ == "SaapCudaImpl"
    assert not CUSTOM.get_class().supports_kv_connector()
    assert CPU_ATTN.get_path() == before


def test_flash_attention_writes_what_is_attended(monkeypatch):
    """vLLM's class around ours, but for the operator that writes keys into the cache."""
    from vllm.v1.attention.backends import flash_attn

    from saap.vllm.cuda import SaapCudaImpl
    from saap.vllm.rows import RowPlan

    def write(key, value, key_cache, value_cache, slots, *_):
        for cache, own in ((key_cache, key), (value_cache, value)):
            cache[slots // 16, slots % 16] = own[: len(slots)]

    monkeypatch.setenv("SAAP_VLLM", "1")
    monkeypatch.setattr(flash_attn, "reshape_and_cache_flash", write, raising=False)
    impl = SaapCudaImpl(6, 64, 0.125, 2, None, None, "auto")
    layer = SimpleNamespace(_k_scale=None, _v_scale=None)
    cache = torch.zeros(5, 16, 2, 128).transpose(1, 2)
    key, value = torch.randn(2, 40, 2, 64)
    slots = torch.arange(16, 56)  # pages 1, 2 and 3
    impl.do_kv_cache_update(layer, key, value, cache, slots)
    plan = RowPlan(1, 40, Options(visited=1.0, dense_below=0))
    step = SimpleNamespace(
        saap=plan, block_table=torch.tensor([[1, 2, 3]]).int(), seq_lens=torch.tensor([40]).int()
    )
    query, output = torch.randn(1, 6, 64), torch.empty(1, 6, 64)
    impl.forward(layer, query, key[-1:], value[-1:], cache, step, output)
    expected = exact(query[0], key, value, 0.125)
    torch.testing.assert_close(output[0].double(), expected, atol=1e-5, rtol=1e-5)


def test_before_a_step_is_captured_everything_is_made(monkeypatch):
    """Codes of all layers, and a step of the longest context: nothing is left to the capture."""
    from saap.vllm.cuda import RowBuilder, RowImpl
    from saap.vllm.rows import RowPlan

    steps = []

    class Stock:
        def build_for_cudagraph_capture(self, common):
            plan = RowPlan(2, 40, Options(visited=0.5, dense_below=0, sinks=1, window=2))
            table = torch.tensor([[1, 2, 3], [0, 4, 0]]).int()
            return SimpleNamespace(
                saap=plan, block_table=table, seq_lens=torch.tensor([48, 20]).int()
            )

    class Builder(RowBuilder, Stock):
        def __init__(self, layers):
            self.layers = layers
            self.vllm_config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=48))

        def saap_layers(self):
            return self.layers

    class Impl(RowImpl):
        def __init__(self):
            self.saap_codes, self.num_heads, self.scale = None, 6, 0.125

        def attend_sparsely(self, layer, query, cache, codes, plan, *rest):
            steps.append((layer, plan.most, query.shape))
            super().attend_sparsely(layer, query, cache, codes, plan, *rest)

    layers = [SimpleNamespace(impl=Impl(), kv_cache=torch.zeros(5, 2, 16, 128)) for _ in range(3)]
    metadata = Builder(layers).build_for_cudagraph_capture(None)
    assert metadata.saap.most == 48
    assert [layer.impl.saap_codes.pages for layer in layers] == [5, 5, 5]
    assert not layers[0].impl.saap_codes.words.any()
    assert steps == [(layers[0], 48, (2, 6, 64))]


def test_another_device_is_refused(monkeypatch):
    platform(monkeypatch, cuda=False)
    monkeypatch.setenv("SAAP_VLLM", "1")
    with pytest.raises(ValueError, match="needs vLLM on a CPU or on CUDA"):
        saap.vllm.register()


def metadata(starts, lens):
    from vllm.v1.attention.backend import CommonAttentionMetadata

    starts, lens = torch.tensor(starts).int(), torch.tensor(lens).int()
    return CommonAttentionMetadata(
        query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=lens, num_reqs=len(lens),
        num_actual_tokens=int(starts[-1]), max_query_len=int(starts.diff().max()),
        max_seq_len=int(lens.max()), block_table_tensor=torch.arange(12).view(3, 4).int(),
        slot_mapping=torch.arange(int(starts[-1])), seq_lens_cpu_upper_bound=lens,
    )  # fmt: skip


def test_the_requests_behind_those_that_decode():
    rest = behind(metadata([0, 1, 2, 7], [9, 30, 40]), 2)
    assert (rest.num_reqs, rest.num_actual_tokens) == (1, 5)
    assert rest.query_start_loc.tolist() == rest.query_start_loc_cpu.tolist() == [0, 5]
    assert rest.seq_lens.tolist() == rest.seq_lens_cpu_upper_bound.tolist() == [40]
    assert rest.block_table_tensor.tolist() == [[8, 9, 10, 11]]
    assert rest.slot_mapping.tolist() == [2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("starts", "expected"), [([0, 1, 2, 5], 2), ([0, 3, 4], 0), ([0, 1], 1), ([0], 0)]
)
def test_requests_that_decode_come_first(starts, expected):
    assert leading_decodes(torch.tensor(starts)) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (Options(visited=1.0), [1, 64, 66, 250]),
        # 16 tokens of window may lie in two pages, 16 sinks in one.
        (Options(visited=0.01, dense_below=0), [1, 3, 3, 3]),
        (Options(visited=0.1, dense_below=0), [1, 7, 7, 25]),
        (Options(visited=0.1, dense_below=2048), [1, 64, 7, 25]),
    ],
)
def test_how_many_pages_a_request_visits(options, expected):
    lens = torch.tensor([1, 2048, 2100, 8000], dtype=torch.int32)
    assert pages_to_keep(lens, options, 32).tolist() == expected
