"""Checkpoints in files of a limited size: safetensors parts, and a manifest that names them.

The manifest is replaced last and whole, so a run that is killed while it saves continues from the
checkpoint before. What is loaded is to the bit what was saved; types narrower than float32 round
once, when they are saved.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from saap.index.tensor_files import write_atomically

MANIFEST = "checkpoint.json"
VERSION = 1
PART_BYTES = 15_500_000  # many ways to carry a file stop at 16 MB


def save_parts(folder: Path, tensors: dict[str, Tensor], header: dict) -> None:
    """Write `tensors` and `header` (JSON) into `folder`, in the place of what it held.

    Raises ValueError for a tensor larger than a part, for one that is not finite, and where the
    folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    groups = split(tensors)
    for number, group in enumerate(groups, 1):
        content = save(group)
        name = f"step-{header['step']:06d}-{number}-of-{len(groups)}.safetensors"
        write_atomically(folder / name, content)
        entries.append({"file": name, "sha256": hashlib.sha256(content).hexdigest()})
    manifest = {"version": VERSION, **header, "parts": entries}
    write_atomically(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    kept = {entry["file"] for entry in entries}
    for old in folder.glob("step-*.safetensors"):
        if old.name not in kept:
            old.unlink()


def split(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Groups of at most PART_BYTES, in the order of the names given."""
    groups: list[dict[str, Tensor]] = [{}]
    room = PART_BYTES
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{name} must be finite in {tensor.dtype}; got NaN or inf: nothing was saved"
            )
        size = tensor.nbytes + 512  # its entry in the file's header
        if size > PART_BYTES:
            raise ValueError(f"{name} must take at most {PART_BYTES} bytes; got {size}")
        if size > room:
            groups.append({})
            room = PART_BYTES
        groups[-1][name] = tensor
        room -= size
    return [group for group in groups if group]


def load_parts(folder: Path) -> tuple[dict[str, Tensor], dict]:
    """Load the tensors and header of `save_parts`; a ValueError names a part that is not whole."""
    manifest = json.loads((folder / MANIFEST).read_text())
    if manifest.pop("version", None) != VERSION:
        raise ValueError(f"{folder / MANIFEST}: format version must be {VERSION}; got another")
    tensors: dict[str, Tensor] = {}
    for entry in manifest.pop("parts"):
        path = folder / entry["file"]
        content = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise ValueError(f"{path}: must be as {MANIFEST} says; got a missing or altered file")
        tensors |= load(content)
    return tensors, manifest


def has_checkpoint(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def pack(model, optimizers, weights: torch.dtype, states: torch.dtype) -> dict[str, Tensor]:
    """Weights and optimiser states as named tensors on the CPU; counters keep their type."""
    tensors = {f"model.{n}": t.detach().to("cpu", weights) for n, t in model.state_dict().items()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                narrow = states if value.ndim else value.dtype
                tensors[f"optimizer.{number}.{index}.{key}"] = value.detach().to("cpu", narrow)
    return {name: t.contiguous().clone() for name, t in tensors.items()}


def unpack(tensors: dict[str, Tensor], model, optimizers) -> None:
    """The opposite of `pack`, into `model` and `optimizers`, in their own types."""
    model.load_state_dict(model_weights(tensors))
    for number, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith(f"optimizer.{number}."):
                index, key = name.split(".")[2:]
                state.setdefault(int(index), {})[key] = tensor.clone()
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def model_weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix("model."): t.float()
        for name, t in tensors.items()
        if name.startswith("model.")
    }
