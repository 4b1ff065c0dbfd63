"""`TrainedIndex`: partitions and routers of all layers of one model, in one safetensors file."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from saap.index import tensor_files
from saap.index.coordinates import Coordinates
from saap.index.routers import ROUTERS, CentroidRouter, Router

from . import index_file
from .notebook import line, size, table

SCORING = ("n_segments", "interleaved", "sm_scale")


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
    coordinates: Coordinates | None = None

    @property
    def nlist(self) -> int:
        return self.centroids.shape[1]

    def router(self, name: str) -> Router:
        if name == "centroid":
            return CentroidRouter(self.centroids)
        if name not in self.routers:
            raise ValueError(
                f"router must be one that was trained, {', '.join(['centroid', *self.routers])}; "
                f"got {name!r}"
            )
        return self.routers[name]


@dataclass(frozen=True, repr=False)
class TrainedIndex:
    """What `saap.train` makes and decoding needs, for every layer of one model.

    A layer with a sliding window, which is never searched, is None. `metadata`: `model` (shapes,
    RoPE, fingerprint), `nlist`, `router` (the default one), `n_segments` (time segments per
    bucket), `interleaved` and `sm_scale` (of each layer), `seed`, `context`, `n_sink`, `window`,
    `corpus` (hash and number of tokens), `recall` (of each router, layer and query head: recall of
    the middle on a held-out
    part, as measured after training).
    """

    layers: tuple[LayerIndex | None, ...]
    metadata: dict

    @property
    def first_layer(self) -> LayerIndex:
        """The first layer that is searched: shapes and sizes are those of all others."""
        return next(layer for layer in self.layers if layer is not None)

    @property
    def nlist(self) -> int:
        return self.metadata["nlist"]

    @property
    def default_router(self) -> str:
        return self.metadata["router"]

    def _facts(self) -> list[tuple[str, object]]:
        about = self.metadata
        searched = sum(layer is not None for layer in self.layers)
        return [
            ("model", about["model"].get("model_type", "?")),
            ("layers searched", f"{searched} of {len(self.layers)}"),
            ("buckets", self.nlist),
            ("router", self.default_router),
            ("trained at", f"{about['context']:,} tokens" if "context" in about else "?"),
            ("size", size(sum(t.nbytes for t in self.tensors().values()))),
        ]

    def __repr__(self) -> str:
        return line("TrainedIndex", self._facts())

    def _repr_html_(self) -> str:
        return table("TrainedIndex", self._facts())

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
                    f"the index must be trained for this model, with {key} "
                    f"{description.get(key)}; got an index with {key} {own[key]}"
                )

    def tensors(self) -> dict[str, Tensor]:
        found = {}
        for number, layer in enumerate(self.layers):
            if layer is None:
                continue
            prefix = f"layers.{number}."
            found[prefix + "centroids"] = layer.centroids
            for part in ("centroids_rope", "key_scale", "inv_freq"):
                if getattr(layer, part) is not None:
                    found[prefix + part] = getattr(layer, part)
            if layer.coordinates is not None:
                for part, tensor in layer.coordinates.tensors().items():
                    found[f"{prefix}coordinates.{part}"] = tensor
            for name, router in layer.routers.items():
                for part, tensor in router.tensors().items():
                    found[f"{prefix}{name}.{part}"] = tensor
        return {name: tensor.cpu().contiguous() for name, tensor in found.items()}

    @property
    def fingerprint(self) -> str:
        """A digest of all tensors and of what scores depend on beside them."""
        scoring = {k: self.metadata[k] for k in SCORING if k in self.metadata}
        digest = hashlib.sha256(json.dumps(scoring, sort_keys=True).encode())
        digest.update(tensor_files.fingerprint(self.tensors()).encode())
        return digest.hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Write one file; a file of that name is replaced only when the new one is complete."""
        self._save(path, index_file.FORMAT)

    def _save(self, path: str | Path, kind: tensor_files.Format) -> None:
        tensor_files.write(path, kind, self.metadata, self.tensors())

    @classmethod
    def load(cls, path: str | Path) -> "TrainedIndex":
        """Read a file that `save` wrote. Raises ValueError for any other, and for altered ones."""
        return cls._load(path, index_file.FORMAT)

    @classmethod
    def _load(cls, path: str | Path, kind: tensor_files.Format) -> "TrainedIndex":
        metadata, tensors = index_file.read(Path(path), kind)
        layers = tuple(
            layer_from_tensors(tensors, number, metadata)
            for number in range(metadata["model"]["num_layers"])
        )
        return cls(layers, metadata)

    @classmethod
    def load_layer(cls, path: str | Path) -> "TrainedIndex":
        """Read what `save_layer` wrote."""
        return cls._load(path, index_file.LAYER_FORMAT)

    def save_layer(self, path: str | Path) -> None:
        """Write an index of one layer, which says less, to a work folder."""
        self._save(path, index_file.LAYER_FORMAT)


def layer_from_tensors(
    tensors: dict[str, Tensor], number: int, metadata: dict
) -> LayerIndex | None:
    prefix = f"layers.{number}."
    own = {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
    if not own:
        return None
    routers = {}
    for name, router_class in ROUTERS.items():
        parts = {k.split(".", 1)[1]: t for k, t in own.items() if k.startswith(name + ".")}
        if parts:
            routers[name] = router_class(**parts)
    parts = {k.split(".", 1)[1]: t for k, t in own.items() if k.startswith("coordinates.")}
    coordinates = Coordinates(**parts) if parts else None
    return LayerIndex(
        own["centroids"],
        routers,
        own.get("centroids_rope"),
        metadata["n_segments"],
        own.get("key_scale"),
        own.get("inv_freq"),
        metadata["interleaved"],
        metadata["sm_scale"][number],
        coordinates,
    )
