"""Several processes that train one model, each its own layers, as `torchrun` starts them.

Layers need nothing from each other but hidden states, which every process computes for itself: a
forward pass costs little beside k-means, targets and routers. Finished layers meet in the work
folder, which all processes share and which a resumed training needs anyway. So no tensor travels
and there is no collective that could hang: what processes tell each other goes through torch's
store, and is only that they are alive, done, or failed, and with what error.
"""

import os
import threading
import time
from contextlib import suppress
from datetime import timedelta

PATIENCE = 60.0
STARTING = 5  # times as long for one that has not been heard of at all
ADVICE = "; finished layers are kept: the same command goes on"


class ProcessLost(ChildProcessError):
    """Another process of the same training failed, or is not heard of any more."""


class Processes:
    """This process as `rank` of `world`; layers are dealt out in turn.

    A thread tells the others every so often that this one is alive, and listens to them. After
    `patience` seconds of silence another counts as dead. Use as a context: leaving it on an error
    tells the others what it was.
    """

    def __init__(self, store, rank: int, world: int, *, patience: float = PATIENCE):
        self.store, self.rank, self.world, self.patience = store, rank, world, patience
        self._others = [r for r in range(world) if r != rank]
        self._lost: str | None = None
        self._news: dict[str, str] = {}
        self._everyone: set[str] = set()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._talk, daemon=True)

    @classmethod
    def from_environment(cls, *, patience: float = PATIENCE) -> "Processes | None":
        """What `torchrun` says in RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; None outside."""
        if int(os.environ.get("WORLD_SIZE", 1)) < 2:
            return None
        import torch.distributed as dist

        timeout = timedelta(seconds=STARTING * patience)
        try:
            store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
        except (RuntimeError, ValueError, OSError) as error:
            line = str(error).strip().splitlines()[0]
            raise ProcessLost(f"the processes do not find each other ({line})") from error
        return cls(store, rank, world, patience=patience)

    def owns(self, layer: int) -> bool:
        return layer % self.world == self.rank

    def check(self) -> None:
        """Raise ProcessLost when another process cannot go on."""
        if self._lost is not None:
            raise ProcessLost(self._lost)

    def reach(self, place: str) -> None:
        """Wait until every process has come to `place`. Raises ProcessLost."""
        self._news[f"{place}/{self.rank}"] = "1"
        while place not in self._everyone:
            self.check()
            time.sleep(0.02)

    def __enter__(self) -> "Processes":
        self._thread.start()
        return self

    def __exit__(self, kind, error, _) -> None:
        if error is None:
            self._leave()
        elif not isinstance(error, ProcessLost):
            line = (str(error).strip().splitlines() or [kind.__name__])[0]
            self._news[f"failed/{self.rank}"] = line
        self._closing.set()
        self._thread.join(timeout=self.patience)
        if error is not None and self.rank == 0:
            time.sleep(3 * self._pause)  # it may keep the store: the others have to read why

    def _leave(self) -> None:
        """The first process, which may keep the store, waits for the others' good-byes."""
        self._news[f"gone/{self.rank}"] = "1"
        if self.rank == 0:
            with suppress(ProcessLost):
                self.reach("gone")

    @property
    def _pause(self) -> float:
        return min(0.2, self.patience / 10)

    def _talk(self) -> None:
        beats, heard = 0, {r: (None, time.monotonic()) for r in self._others}
        told: set[str] = set()
        try:
            while True:
                closing = self._closing.is_set()
                for key in [k for k in self._news if k not in told]:
                    self.store.set(key, self._news[key])
                    told.add(key)
                beats += 1
                self.store.set(f"alive/{self.rank}", str(beats))
                if closing:
                    return
                self._listen(heard, told)
                self._closing.wait(self._pause)
        except (RuntimeError, OSError) as error:  # the process that keeps the store is gone
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self._lost = f"the other processes cannot be reached any more ({line}){ADVICE}"

    def _listen(self, heard: dict, told: set[str]) -> None:
        own_places = {key.split("/")[0] for key in told}
        for place in own_places - {"failed"} - self._everyone:
            if self.store.check([f"{place}/{r}" for r in self._others]):
                self._everyone.add(place)
        now = time.monotonic()
        for r in self._others:
            if self.store.check([f"failed/{r}"]):
                self._lost = f"process {r} stopped: {self.store.get(f'failed/{r}').decode()}"
                continue
            alive = f"alive/{r}"
            beat = self.store.get(alive) if self.store.check([alive]) else None
            if beat != heard[r][0]:
                heard[r] = (beat, now)
                continue
            limit = self.patience if beat else STARTING * self.patience
            if now - heard[r][1] > limit and not self.store.check([f"gone/{r}"]):
                self._lost = f"process {r} has not been heard of for {limit:.0f} s{ADVICE}"
