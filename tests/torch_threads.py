"""Settings of torch for the length of a test: its number of threads, and others."""

from contextlib import contextmanager

import torch


@contextmanager
def torch_setting(name: str, value):
    """`torch.get_<name>()` is this value."""
    before = getattr(torch, f"get_{name}")()
    change = getattr(torch, f"set_{name}")
    change(value)
    try:
        yield
    finally:
        change(before)


def torch_threads(count: int):
    return torch_setting("num_threads", count)
