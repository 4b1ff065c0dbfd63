"""What a run depends on besides its options."""

import importlib.metadata
import os
import platform

import torch

PACKAGES = ("torch", "numpy", "faiss-cpu", "faiss-gpu", "transformers", "numba", "triton")


def environment() -> dict:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "python": platform.python_version(),
        "platform": platform.system(),
        "device": device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "packages": versions,
    }
