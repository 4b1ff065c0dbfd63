"""`TrainedIndex`: partitions and routers of all layers of one model, in one safetensors file."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save as serialize
from torch import Tensor

from saap.index.routers import ROUTERS, CentroidRouter, Router
from saap.index.tensor_files import read, write_atomically

FORMAT_VERSION = 2
FORMAT = "saap.TrainedIndex"


@dataclass(frozen=True)
class LayerIndex:
    """One layer: `centroids [Hkv, nlist, D]` on de-RoPEd keys and the routers trained for it.

    `centroids_rope`, of keys with RoPE left on, exists only to be compared with. What turned
    centroids need (`saap.routing`): `n_segments`; `key_scale [Hkv, nlist]`, the mean product of a
    bucket's keys with its centroid; `inv_freq`, radians a token by which pairs of dimensions turn,
    None without RoPE; `interleaved`, how dimensions pair up; `sm_scale` of the attention.
    """

    centroids: Tensor
    routers: dict[str, Router] = field(default_factory=dict)
    centroids_rope: Tensor | None = None
    n_segments: int = 1
    key_scale: Tensor | None = None
    inv_freq: Tensor | None = None
    interleaved: bool = False
    sm_scale: float = 1.0

    @property
    def nlist(self) -> int:
        return self.centroids.shape[1]

    def router(self, name: str) -> Router:
        if name == "centroid":
            return CentroidRouter(self.centroids)
        if name not in self.routers:
            raise ValueError(
                f"router={name!r} was not trained: accepted are "
                f"{', '.join(['centroid', *self.routers])}"
            )
        return self.routers[name]


@dataclass(frozen=True)
class TrainedIndex:
    """What `saap.train` makes and decoding needs, for every layer of one model.

    `metadata`: `model` (shapes, RoPE, fingerprint), `nlist`, `router` (the default one),
    `n_segments` (time segments a bucket), `interleaved` and `sm_scale` (a layer), `seed`,
    `context`, `n_sink`, `window`, `corpus` (hash and number of tokens), `recall` (middle recall a
    router, layer and query head on a held-out part, as measured after training).
    """

    layers: tuple[LayerIndex, ...]
    metadata: dict

    @property
    def nlist(self) -> int:
        return self.metadata["nlist"]

    @property
    def default_router(self) -> str:
        return self.metadata["router"]

    def check_model(self, description: dict) -> None:
        """Raise ValueError naming what differs when this index was trained for another model."""
        own = self.metadata["model"]
        # What a reader understands first; weights last.
        for key in sorted(own, key=lambda k: (k == "attention_norms", k != "model_type", k)):
            same = own[key] == description.get(key)
            if key == "attention_norms":
                same = len(own[key]) == len(description[key]) and all(
                    abs(a - b) <= 0.01 * a for a, b in zip(own[key], description[key], strict=True)
                )
            if not same:
                raise ValueError(
                    f"this index was trained for another model: its {key} is {own[key]}, the "
                    f"model's is {description.get(key)}"
                )

    def tensors(self) -> dict[str, Tensor]:
        found = {}
        for number, layer in enumerate(self.layers):
            prefix = f"layers.{number}."
            found[prefix + "centroids"] = layer.centroids
            for part in ("centroids_rope", "key_scale", "inv_freq"):
                if getattr(layer, part) is not None:
                    found[prefix + part] = getattr(layer, part)
            for name, router in layer.routers.items():
                for part, tensor in router.tensors().items():
                    found[f"{prefix}{name}.{part}"] = tensor
        return {name: tensor.cpu().contiguous() for name, tensor in found.items()}

    def save(self, path: str | Path) -> None:
        """Write one file; a file of that name is replaced only when the new one is complete."""
        path = Path(path)
        tensors = self.tensors()
        header = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "sha256": checksum(tensors),
            **self.metadata,
        }
        data = serialize(tensors, metadata={FORMAT: json.dumps(header, sort_keys=True)})
        write_atomically(path, data)

    @classmethod
    def load(cls, path: str | Path) -> "TrainedIndex":
        """Read a file that `save` wrote. Raises ValueError for any other, and for altered ones."""
        path = Path(path)
        header, tensors = read(path, FORMAT, FORMAT_VERSION, "`saap train`")
        if header.pop("sha256", None) != checksum(tensors):
            raise ValueError(
                f"{path}: its checksum does not fit its content: the file was altered"
            )
        metadata = {k: v for k, v in header.items() if k not in ("format", "format_version")}
        layers = tuple(
            layer_from_tensors(tensors, number, metadata)
            for number in range(metadata["model"]["num_layers"])
        )
        return cls(layers, metadata)


def layer_from_tensors(tensors: dict[str, Tensor], number: int, metadata: dict) -> LayerIndex:
    prefix = f"layers.{number}."
    own = {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
    routers = {}
    for name, router_class in ROUTERS.items():
        parts = {k.split(".", 1)[1]: t for k, t in own.items() if k.startswith(name + ".")}
        if parts:
            routers[name] = router_class(**parts)
    return LayerIndex(
        own["centroids"],
        routers,
        own.get("centroids_rope"),
        metadata["n_segments"],
        own.get("key_scale"),
        own.get("inv_freq"),
        metadata["interleaved"],
        metadata["sm_scale"][number],
    )


def checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
