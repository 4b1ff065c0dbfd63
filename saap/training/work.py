"""The work folder of a training: what is finished, so that a killed one goes on.

`manifest.json` says what is trained on what; `layer-N.safetensors` is a finished layer, a
`TrainedIndex` of one; `hidden-*` are hidden states on their way (`saap.training.hidden`).
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

try:
    import fcntl
except ImportError:
    fcntl = None

from saap.index.file_fields import Fields
from saap.index.tensor_files import pieces, write_atomically
from saap.trained_index import TrainedIndex

from .hidden import HiddenOnDisk
from .layer import FinishedLayer
from .processes import Processes

MANIFEST = "manifest.json"
MANIFEST_VERSION = 2


class WorkFolder:
    """`folder` with the manifest of this training; created if it is not there.

    With `processes`, the first one creates it and the others wait for that. Raises ValueError,
    naming what differs, when the folder holds another training, and when it holds files but no
    manifest, or has no room for `bytes_needed`.
    """

    def __init__(
        self,
        folder: Path,
        manifest: dict,
        processes: Processes | None = None,
        *,
        bytes_needed: int = 0,
    ):
        check_room(folder, bytes_needed)
        self.folder = folder
        self.rank = 0 if processes is None else processes.rank
        manifest = json.loads(json.dumps({"version": MANIFEST_VERSION, **manifest}))
        self._held: int | None = None  # the folder, locked
        if self.rank == 0:
            try:
                self._open_or_create(manifest)
            except ValueError:
                self.close()
                raise
        if processes is not None:
            processes.reach("work folder")
            if not (folder / MANIFEST).is_file():
                raise ValueError(
                    f"{folder}: must be a folder that all processes share; got one in which "
                    f"process {self.rank} does not see what process 0 wrote"
                )
            self._check(manifest)

    def close(self) -> None:
        """Another training may go on in the folder."""
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def _open_or_create(self, manifest: dict) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # What a write that was killed leaves is named with a dot first.
            is_empty = all(path.name.startswith(".") for path in self.folder.iterdir())
        except OSError as error:
            raise ValueError(f"{self.folder}: cannot be used ({error.strerror})") from error
        self._take()
        if (self.folder / MANIFEST).is_file():
            self._check(manifest)
        elif is_empty:
            content = json.dumps(manifest, indent=1, sort_keys=True).encode()
            write_atomically(self.folder / MANIFEST, content)
        else:
            raise ValueError(
                f"{self.folder}: must be a folder that `saap train` made, an empty one, or none; "
                f"got one that holds files but no {MANIFEST}"
            )

    def _take(self) -> None:
        """Until this is closed, no other training is at work in the folder."""
        if fcntl is None:
            return
        self._held = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{self.folder}: must be used by one training at a time; got a second one while "
                "another is at work"
            ) from None
        except OSError:  # a file system without locks
            return

    def _check(self, manifest: dict) -> None:
        try:
            found = json.loads((self.folder / MANIFEST).read_bytes())
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ValueError(
                f"{self.folder / MANIFEST}: must be a manifest; got another file: delete "
                f"{self.folder}"
            )
        before, now = _flat(found), _flat(manifest)
        for name in now | before:
            if not _same(before.get(name), now.get(name)):
                raise ValueError(
                    f"{self.folder}: must be continued with what it was started with, an "
                    f"unfinished training with {name}={before.get(name)!r}; got "
                    f"{now.get(name)!r}: "
                    "or delete that folder to start again"
                )

    def hidden_states(self, first: int) -> HiddenOnDisk:
        """This process's hidden states, at layer `first` or as near before it as there are."""
        return HiddenOnDisk(self.folder, self.rank, first)

    def _layer(self, number: int) -> Path:
        return self.folder / f"layer-{number}.safetensors"

    def has(self, number: int) -> bool:
        return self._layer(number).is_file()

    def save(self, number: int, finished: FinishedLayer) -> None:
        layer = finished.index
        n_kv, nlist, dim = layer.centroids.shape
        n_heads = len(finished.recall["oracle"])
        shapes = {"num_layers": 1, "num_heads": n_heads, "num_kv_heads": n_kv}
        metadata = {
            "model": {**shapes, "head_dim": dim},
            "nlist": nlist,
            "n_segments": layer.n_segments,
            "interleaved": layer.interleaved,
            "sm_scale": [layer.sm_scale],
            "recall": finished.recall,
        }
        TrainedIndex((layer,), metadata).save_layer(self._layer(number))

    def check(self, number: int) -> None:
        """ValueError for a finished layer that cannot be read, before others are trained."""
        try:
            self.load(number)
        except ValueError as error:
            raise ValueError(f"{error}: delete that file to train the layer again") from error

    def load(self, number: int) -> FinishedLayer:
        path = self._layer(number)
        index = TrainedIndex.load_layer(path)
        recall = Fields(path, index.metadata).section("recall")
        count = index.metadata["model"]["num_heads"]
        return FinishedLayer(index.layers[0], {n: recall.numbers(n, count) for n in recall.values})


def weights_digest(model) -> str:
    """SHA-256 of all parameters that are in memory, by name, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        if not weight.is_meta:
            for piece in pieces(weight.detach().resolve_neg()):
                digest.update(piece)
    return digest.hexdigest()


def check_room(folder: Path, needed: int) -> None:
    """Raise ValueError when `folder` has no room for `needed` bytes; its own files are reused."""
    there = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    free = free_bytes(next(p for p in (folder, *folder.absolute().parents) if p.exists()))
    if free + there < needed:
        raise ValueError(
            f"{folder}: must have {needed / 1e6:,.1f} MB free for hidden states; got "
            f"{free / 1e6:,.1f} MB free: make room, or take fewer or shorter texts"
        )


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def remove_work(folder: Path) -> None:
    """Remove what a training puts into `folder`, and it when nothing else is in it."""
    for path in folder.glob("hidden-*"):
        shutil.rmtree(path, ignore_errors=True)
    for pattern in ("layer-*.safetensors", ".layer-*", ".manifest*", MANIFEST):
        for path in folder.glob(pattern):
            path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def _flat(nested: dict, prefix: str = "") -> dict:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    found = {}
    for name, value in nested.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def _same(before, now) -> bool:
    """Equal; lists of measured numbers, which threads add in another order, to 1 %."""
    if isinstance(before, list) and isinstance(now, list):
        return len(before) == len(now) and all(
            isinstance(a, (int, float)) and abs(a - b) <= 0.01 * abs(a)
            for a, b in zip(before, now, strict=True)
        )
    return before == now
