"""The group of processes that hold a context: its collectives, counted, and its errors."""

import datetime
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

SHOWN = 160  # characters of a value in an error


class GroupError(RuntimeError):
    """The ranks of a group do not fit together, or one of them is gone."""


class Group:
    """Collectives over a process group that is initialised already.

    `messages` and `bytes_sent` count what this rank has handed to collectives. Tensors are sent
    from where they are: the group's backend has to take them (gloo: CPU, nccl: GPU).
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None):
        self.process_group = process_group
        self.rank = dist.get_rank(process_group)
        self.size = dist.get_world_size(process_group)
        self.messages = self.bytes_sent = 0

    def gather(self, own: Tensor) -> list[Tensor]:
        """The tensors of all ranks, which have one shape and dtype, by rank."""
        own = own.contiguous()
        found = [torch.empty_like(own) for _ in range(self.size)]
        self._collective(own, lambda: dist.all_gather(found, own, group=self.process_group))
        return found

    def add(self, own: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        assert own.is_contiguous()
        self._collective(own, lambda: dist.all_reduce(own, group=self.process_group))
        return own

    def _collective(self, own: Tensor, call: Callable) -> None:
        self.messages += 1
        self.bytes_sent += own.nbytes
        try:
            call()
        except RuntimeError as error:
            raise GroupError(
                f"all {self.size} ranks must take part until the end; rank {self.rank} got no "
                f"answer from another one, which has ended or hangs ({_reason(error)})"
            ) from error

    def agree(self, what: dict[str, str], device: torch.device | str = "cpu") -> None:
        """Raise GroupError on every rank, naming the first that differs, unless all are the same.

        All ranks give the same names.
        """
        digests = [hashlib.sha256(value.encode()).digest() for value in what.values()]
        text = "".join(value[:SHOWN].ljust(SHOWN) for value in what.values()).encode(
            "ascii", "replace"
        )
        own = torch.frombuffer(bytearray(b"".join(digests) + text), dtype=torch.uint8).to(device)
        every = [bytes(t.cpu().numpy()) for t in self.gather(own)]
        for number, name in enumerate(what):
            own_digest = slice(32 * number, 32 * number + 32)
            start = 32 * len(what) + SHOWN * number
            for rank, other in enumerate(every):
                if other[own_digest] != every[0][own_digest]:
                    values = [e[start : start + SHOWN].decode().strip() for e in (every[0], other)]
                    raise GroupError(
                        f"all ranks must have the same {name}; got {values[0]} on rank 0 and "
                        f"{values[1]} on rank {rank}"
                    )


def _reason(error: BaseException) -> str:
    """What happened, without the place in gloo's source."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    for known in ("Connection reset by peer", "Connection closed by peer", "Timed out"):
        if known in text:
            return known
    return text[:SHOWN]


@contextmanager
def joined(*, timeout: float = 60.0, backend: str | None = None) -> Iterator[Group]:
    """Join the group that `torchrun` (or RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) describes.

    `timeout`: seconds that a rank waits for another one before it gives up. `backend`: nccl where
    there is a GPU, else gloo. A GroupError or ValueError in the block ends this process with one
    line and exit code 2, so that the others end too and nothing hangs.
    """
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    try:
        try:
            dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout))
        except (RuntimeError, ValueError) as error:
            raise GroupError(
                "a group must be described by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as "
                f"torchrun sets them, and all ranks must join; got {_reason(error)}"
            ) from error
        yield Group()
    except (GroupError, ValueError) as error:
        rank = os.environ.get("RANK", "?")
        print(f"error: rank {rank}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        # Leaving in the ordinary way waits for the others, who may wait for this one.
        os._exit(2)
    else:
        dist.destroy_process_group()
