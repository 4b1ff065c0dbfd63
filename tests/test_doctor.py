"""`saap doctor`: what it finds, what it says is missing, and that its tests can fail."""

import importlib.util

import pytest

from saap.eval import doctor

from .test_cli import run_cli


def test_the_command_is_content_here(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = run_cli(monkeypatch, capsys, "doctor")
    assert code == 0, out + err
    assert "2.13" in out or "torch" in out
    assert out.count("right") == len(doctor.TESTS)


def test_what_is_missing_comes_with_a_command(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name)
    )
    (found,) = [f for f in doctor.installed() if f.name == "transformers"]
    assert (found.state, found.needed) == ("not installed", True)
    assert found.install == "pip install 'saap[hf]'"


def test_a_wrong_kernel_is_told(monkeypatch, capsys):
    from saap.kernels.attention import api

    right = api.attend_ranges

    def wrong(*arguments, impl=None):
        out, lse = right(*arguments, impl=impl)
        return (out, lse) if impl == "reference" else (out * 1.01, lse)

    monkeypatch.setattr(api, "attend_ranges", wrong)
    monkeypatch.setattr(doctor, "TESTS", (doctor.kernel_test,))
    code, out, _ = run_cli(monkeypatch, capsys, "doctor")
    assert code == 1
    assert "wrong  kernel" in out


@pytest.mark.parametrize("error", [ImportError("no FAISS"), RuntimeError("bad\nlaunch")])
def test_a_test_that_cannot_run_is_wrong(error):
    def kernel_test():
        raise error

    check = doctor.run(kernel_test)
    assert (check.right, check.name) == (False, "kernel test")
    assert "\n" not in check.told
