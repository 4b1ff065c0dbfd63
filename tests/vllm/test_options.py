"""What `SAAP_VLLM` may say. Needs no vLLM."""

import pytest

from saap.vllm.options import Options, read_options


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("0", None),
        ("1", Options()),
        ("visited=0.2,window=64", Options(0.2, window=64)),
    ],
)
def test_read(monkeypatch, text, expected):
    monkeypatch.setenv("SAAP_VLLM", text)
    assert read_options() == expected


@pytest.mark.parametrize(
    "text", ["visited=0", "visited=nan", "visited=2", "window=0", "sink=3", "visited", "sinks=x"]
)
def test_refused(monkeypatch, text):
    monkeypatch.setenv("SAAP_VLLM", text)
    with pytest.raises(ValueError, match="must"):
        read_options()
