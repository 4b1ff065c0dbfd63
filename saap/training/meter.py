"""How far a training is, over all layers of this process."""

from collections.abc import Callable

from .layer import Report
from .processes import Processes

Progress = Callable[[str, int, int], None]
"""`progress(what, done, total)`; `what` ends in brackets with what it is at."""
TRAIN, PASS = 1000, 300  # parts of the whole: a layer to train, one only passed through


class Meter:
    """Turns the stages of layers `first` to the last of `todo` into calls of `progress`.

    `own`: the layers of this process; those that are not in `todo` were finished before. Every
    report also asks whether the other processes still go on.
    """

    def __init__(
        self,
        n_layers: int,
        own: list[int],
        todo: list[int],
        first: int,
        progress: Progress | None,
        processes: Processes | None,
    ):
        self.n_layers, self.progress, self.processes = n_layers, progress, processes
        self.finished = TRAIN * (len(own) - len(todo))
        self.parts = {n: TRAIN if n in todo else PASS for n in range(first, todo[-1] + 1)}
        self.total = self.finished + sum(self.parts.values())

    def of_layer(self, layer: int) -> Report:
        before = self.finished + sum(part for n, part in self.parts.items() if n < layer)

        def report(stage: str, share: float) -> None:
            if self.processes is not None:
                self.processes.check()
            if self.progress is not None:
                what = f"layers ({layer + 1} of {self.n_layers}: {stage})"
                self.progress(what, before + round(share * self.parts[layer]), self.total)

        return report

    def done(self) -> None:
        if self.progress is not None:
            self.progress(f"layers (all {self.n_layers})", self.total, self.total)
