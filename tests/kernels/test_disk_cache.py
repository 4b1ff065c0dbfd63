"""Compiled kernels are kept in the user's cache folder, or nowhere; never beside their source."""

import logging
from pathlib import Path

import pytest

pytest.importorskip("numba")
import numba

from saap.kernels.cpu import disk_cache
from saap.kernels.cpu.functions import compiled

SIGNATURE = numba.types.void(numba.types.CPointer(numba.types.int64))


def entry(at):
    at[0] += 1


@pytest.fixture(autouse=True)
def no_settings(monkeypatch, tmp_path):
    """A user without settings, whose home is a temporary folder."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def compile_once(caplog) -> str:
    """What is logged; the function works and nothing is written beside this file."""
    import ctypes

    caplog.clear()
    with caplog.at_level(logging.INFO):
        (function,) = compiled("test", SIGNATURE, [entry])
    number = ctypes.c_int64(6)
    function(ctypes.addressof(number))
    assert number.value == 7
    assert not list(Path(__file__).parent.glob("__pycache__/test_disk_cache*.nb?"))
    assert numba.config.CACHE_DIR == ""
    return caplog.text


def test_in_the_users_cache_folder_and_loaded_from_it(tmp_path, caplog):
    assert "now in the disk cache" in compile_once(caplog)
    assert list((tmp_path / ".cache" / "saap").rglob("*.nbc"))
    assert "loaded in" in compile_once(caplog)


def test_order_of_the_settings(tmp_path, monkeypatch):
    assert disk_cache.folder() == tmp_path / ".cache" / "saap"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert disk_cache.folder() == tmp_path / ".cache" / "saap"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert disk_cache.folder() == tmp_path / "xdg" / "saap"
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "numba"))
    assert disk_cache.folder() == tmp_path / "numba"


def test_without_a_folder_to_write_to(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert disk_cache.folder() is None
    assert "no folder for the disk cache can be written" in compile_once(caplog)


def test_a_disk_that_is_full_when_it_is_written(monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numba.core.caching.Cache.save_overload", full)
    assert "no folder for the disk cache can be written" in compile_once(caplog)


def test_other_libraries_keep_their_setting(monkeypatch, tmp_path):
    theirs = str(tmp_path / "theirs")
    monkeypatch.setattr(numba.config, "CACHE_DIR", theirs)
    with disk_cache.in_user_folder() as found:
        assert found
    assert theirs == numba.config.CACHE_DIR
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    with pytest.raises(ValueError, match="x"), disk_cache.in_user_folder():
        raise ValueError("x")
    assert numba.config.CACHE_DIR == ""
