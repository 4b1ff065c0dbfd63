"""Hidden states of all sequences between two layers: in memory, or in a work folder."""

import shutil
from abc import ABC, abstractmethod
from pathlib import Path

from torch import Tensor

from saap.index import tensor_files

FORMAT = tensor_files.Format("saap.HiddenState", 2, "`saap train`")


class HiddenStates(ABC):
    """Inputs of layer `layer`; `put` what comes out of it, then `advance`.

    A layer's results are the same whether or not it was interrupted, because its inputs stay until
    all of its outputs are there.
    """

    layer: int

    @abstractmethod
    def get(self, number: int) -> Tensor | None:
        """Input of the layer for a sequence, on the CPU; None for layer 0, which embeds."""

    @abstractmethod
    def put(self, number: int, output: Tensor) -> None: ...

    @abstractmethod
    def advance(self) -> None:
        """All outputs are there: they are the inputs of the next layer."""


class HiddenInMemory(HiddenStates):
    """An output takes the place of its input; nothing outlives the process."""

    def __init__(self):
        self.layer = 0
        self._held: dict[int, Tensor] = {}

    def get(self, number):
        return self._held.get(number)

    def put(self, number, output):
        self._held[number] = output.cpu()

    def advance(self):
        self.layer += 1


class HiddenOnDisk(HiddenStates):
    """One folder a layer, `hidden-RANK-LAYER`; it has that name when it is complete.

    Starts at the latest complete layer that is not beyond `first`, else at the embeddings.
    """

    def __init__(self, folder: Path, rank: int, first: int):
        self.folder, self.rank = folder, rank
        complete = [
            int(path.name.rsplit("-", 1)[1])
            for path in folder.glob(f"hidden-{rank}-*")
            if not path.name.endswith(".part")
        ]
        self.layer = max((layer for layer in complete if layer <= first), default=0)
        for path in folder.glob(f"hidden-{rank}-*"):
            if path != self._of(self.layer):
                shutil.rmtree(path)

    def get(self, number):
        if self.layer == 0:
            return None
        path = self._of(self.layer) / f"{number}.safetensors"
        header, tensors = tensor_files.read(path, FORMAT)
        if list(tensors) != ["hidden"]:
            raise ValueError(f"{path}: it must hold hidden; got {', '.join(tensors)}")
        tensor_files.verify(path, header, tensors)
        return tensors["hidden"]

    def put(self, number, output):
        self._next.mkdir(exist_ok=True)
        path = self._next / f"{number}.safetensors"
        tensor_files.write(path, FORMAT, {}, {"hidden": output.cpu()})

    def advance(self):
        before = self._of(self.layer)
        self._next.rename(self._of(self.layer + 1))
        self.layer += 1
        shutil.rmtree(before, ignore_errors=True)

    def _of(self, layer: int) -> Path:
        return self.folder / f"hidden-{self.rank}-{layer}"

    @property
    def _next(self) -> Path:
        return self.folder / f"hidden-{self.rank}-{self.layer + 1}.part"
