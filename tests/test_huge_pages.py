"""Rows lie in huge pages where Linux has them for who asks."""

import mmap
from pathlib import Path

import pytest
import torch

from saap.index import huge_pages
from saap.index.rows import BucketRows

SMAPS, POLICY = Path("/proc/self/smaps"), Path("/sys/kernel/mm/transparent_hugepage/enabled")


def asked_for(tensor: torch.Tensor) -> bool:
    """Whether the kernel notes of the middle of a tensor that huge pages were asked for."""
    middle, inside = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in SMAPS.read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= middle < end
        elif inside and first == "VmFlags:":
            return "hg" in line.split()
    raise AssertionError("no such memory")


@pytest.mark.skipif(not (SMAPS.exists() and POLICY.exists()), reason="needs Linux with huge pages")
def test_rows_ask_for_huge_pages():
    rows = BucketRows()
    rows.reserve(9000, torch.zeros(1, 2, 0, 64), 0)
    assert all(asked_for(rows.vectors[name]) for name in ("k", "v"))
    rows.write(slice(None), 0, [torch.ones(1, 2, 9000, 64)] * 2, 0)
    rows.reserve(12_000, torch.zeros(1, 2, 0, 64), 9000)
    assert all(asked_for(rows.vectors[name]) for name in ("k", "v"))
    assert bool((rows.vectors["v"][:, :, :9000] == 1).all())
    rows.select(torch.tensor([0, 0]), 9000)
    assert asked_for(rows.vectors["k"])
    assert bool((rows.vectors["k"][:, :, :9000] == 1).all())


def test_where_there_are_none_nothing_is_asked_for(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    huge_pages._ask.cache_clear()
    new = huge_pages.empty((huge_pages.LEAST_BYTES,), torch.uint8, torch.device("cpu"))
    huge_pages._ask.cache_clear()
    new.fill_(7)
    assert int(new[-1]) == 7
    assert huge_pages.empty((3, 0), torch.float32, torch.device("cpu")).shape == (3, 0)
