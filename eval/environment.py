"""What a run depends on besides its options."""

import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path

import torch

import saap

from .sources import Read, sources

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


def version(read: Read = Path.read_bytes) -> str:
    """The release and a hash of the sources of all modules that records depend on.

    `read`: gives the content of a source file.
    """
    digest = hashlib.sha256()
    for name, source in sources(read).items():
        digest.update(f"{name} {len(source)} ".encode() + source)
    return f"{saap.__version__}+{digest.hexdigest()[:8]}"
