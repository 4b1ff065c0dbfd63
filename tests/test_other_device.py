"""A model on a device that is not the CPU, where there is none: `fake_gpu` stands in for it.

In a process of its own, since torch knows one such device for good once it has been named.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from saap.kv import KVStore

from . import device_cases as cases

ROOT = Path(__file__).resolve().parents[1]
INSIDE = os.environ.get("SAAP_FAKE_GPU") == "1"
inside = pytest.mark.skipif(not INSIDE, reason="run by test_in_a_process_of_its_own")


@pytest.mark.skipif(INSIDE, reason="the tests run right here")
@pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py has a real one")
def test_in_a_process_of_its_own():
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "tests/test_other_device.py"],
        cwd=ROOT,
        env={**os.environ, "SAAP_FAKE_GPU": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed, 1 skipped" in done.stdout, done.stdout


def on_fake_gpu(ask, peaked=1.0):
    """What `ask(model, device)` gives on the CPU and there."""
    from .fake_gpu import DEVICE, OnGpu, fake_gpu

    expected = ask(cases.tiny_model(peaked), torch.device("cpu"))
    model = cases.tiny_model(peaked)
    with fake_gpu():
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for name, t in held.items():
                    held[name] = None if t is None else t.detach().to(DEVICE)
        found = ask(model, DEVICE)
        assert not isinstance(found, OnGpu)
        return expected, found


@inside
@pytest.mark.parametrize("method", cases.METHODS_WITHOUT_INDEX)
def test_every_method_gives_the_same_there(method, monkeypatch):
    from .fake_gpu import waits

    monkeypatch.setattr(KVStore, "debug", False)  # it looks at every range

    held = []
    expected, found = on_fake_gpu(
        lambda model, device: cases.logits_of_steps(
            model, method, device, after=lambda: held.append(dict(waits()))
        )
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    if method in ("saap", "dense"):  # a step without a flush does not wait for the device
        assert held[-1] == held[-2]


@inside
@pytest.mark.parametrize("variant", cases.VARIANTS)
def test_generates_the_same_there(variant):
    # Rows of nearly equal weight change places by rounding, and with them nearly equal beams.
    expected, found = on_fake_gpu(
        lambda model, device: cases.generated(model, variant, device), peaked=2.0
    )
    assert torch.equal(found, expected)


@inside
def test_goes_on_from_a_saved_context_there(tmp_path):
    expected, found = on_fake_gpu(
        lambda model, device: cases.generated_after_saving(
            model, device, tmp_path / f"{device.type}.safetensors"
        )
    )
    assert torch.equal(found, expected)


@inside
def test_a_tensor_of_the_other_device_is_refused():
    from .fake_gpu import DEVICE, fake_gpu

    with fake_gpu(), pytest.raises(RuntimeError, match="expected all tensors to be on the same"):
        torch.ones(3).to(DEVICE) + torch.ones(3)
