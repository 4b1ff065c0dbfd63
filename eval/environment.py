"""What a run depends on besides its options."""

import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path

import torch

import saap

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


def version() -> str:
    """The release and a hash of the sources that figures depend on."""
    root = Path(saap.__file__).parent
    sources = sorted(
        path
        for folder in (root, root / "hf", root / "methods", root / "index",
                       root / "kernels" / "attention", root / "eval" / "tasks")
        for path in folder.glob("*.py")
    )  # fmt: skip
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return f"{saap.__version__}+{digest[:8]}"
