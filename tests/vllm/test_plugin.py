"""Registration and the plan of a step. Needs vLLM, starts no engine."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed (make vllm)", allow_module_level=True)

from vllm.v1.attention.backends import registry

import saap.vllm
from saap.vllm.options import Options
from saap.vllm.plan import leading_decodes, pages_to_keep

CPU_ATTN = registry.AttentionBackendEnum.CPU_ATTN


@pytest.fixture(autouse=True)
def unregistered(monkeypatch):
    monkeypatch.setattr(saap.vllm, "_registered", False)
    yield
    CPU_ATTN.clear_override()


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
    assert CPU_ATTN.get_path() == "saap.vllm.backend.SaapBackend"
    assert CPU_ATTN.get_class().get_name() == "CPU_ATTN"


def test_another_version_is_refused_before_anything_is_changed(monkeypatch):
    monkeypatch.setenv("SAAP_VLLM", "1")
    monkeypatch.setattr("vllm.__version__", "0.99.0")
    before = CPU_ATTN.get_path()
    with pytest.raises(ValueError, match=r"SAAP_VLLM needs vLLM 0\.32\.0; got 0\.99\.0"):
        saap.vllm.register()
    assert CPU_ATTN.get_path() == before


@pytest.mark.parametrize(
    ("starts", "expected"), [([0, 1, 2, 5], 2), ([0, 3, 4], 0), ([0, 1], 1), ([0], 0)]
)
def test_requests_that_decode_come_first(starts, expected):
    assert leading_decodes(torch.tensor(starts)) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (Options(visited=1.0), [1, 64, 66, 250]),
        # 64 tokens of window may lie in three pages, 16 sinks in one.
        (Options(visited=0.01, dense_below=0), [1, 4, 4, 4]),
        (Options(visited=0.1, dense_below=0), [1, 7, 7, 25]),
        (Options(visited=0.1, dense_below=2048), [1, 64, 7, 25]),
    ],
)
def test_how_many_pages_a_request_visits(options, expected):
    lens = torch.tensor([1, 2048, 2100, 8000], dtype=torch.int32)
    assert pages_to_keep(lens, options, 32).tolist() == expected
