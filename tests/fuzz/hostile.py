"""What all parts of the fuzz suite share: seeds, counts, buffers with canaries, random damage."""

import json
import os
import random
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from saap.kernels.cpu.scratch import Layout

SCALE = int(os.environ.get("SAAP_FUZZ", "0"))
"""Hostile inputs of each part; 0: the bounded part of the normal suite."""
SEED = int(os.environ.get("SAAP_FUZZ_SEED", "0"))
SECONDS = float(os.environ.get("SAAP_FUZZ_SECONDS", "3600"))  # of each part
RECORD = os.environ.get("SAAP_FUZZ_RECORD")  # a JSON file for the counts of each part
RECORD = RECORD and str(Path(RECORD).resolve())  # a part may work in another folder
CANARY, MARGIN = 0xA5, 256  # bytes on both sides; a multiple of every vector's width
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def cases(part: str, bounded: int, one_in: int = 1):
    """Yields a `random.Random` for each case; a failure is told with what repeats it.

    `one_in`: of a part whose cases take long, so many times fewer.
    """
    counts = {"inputs": 0}
    begin = time.monotonic()
    n, end = -(-SCALE // one_in) or bounded, begin + SECONDS
    for number in range(n):
        if time.monotonic() > end:
            break
        own = random.Random(f"{part} {SEED} {number}")
        own.number = number
        try:
            yield own, counts
        except GeneratorExit:
            print(f"\nfuzz {part}: failed at seed {SEED}, number {number}")
            raise
        counts["inputs"] += 1
    told = ", ".join(f"{value:,} {name}" for name, value in counts.items())
    if RECORD:
        path = Path(RECORD)
        found = json.loads(path.read_text()) if path.exists() else {}
        found[part] = {"seed": SEED, "seconds": round(time.monotonic() - begin, 1), **counts}
        found["all parts"] = sum(p["inputs"] for n, p in found.items() if n != "all parts")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\nfuzz {part}: seed {SEED}, {told}")


def torch_seed(own: random.Random) -> torch.Generator:
    return torch.Generator().manual_seed(own.getrandbits(40))


def damaged(own: random.Random, data: bytes) -> bytes:
    """The bytes with some of them flipped, cut, repeated or exchanged."""
    data = bytearray(data)
    for _ in range(own.choice((1, 1, 2, 5))):
        kind, at = own.randrange(5), own.randrange(len(data))
        # Beginnings of files say most.
        at = own.choice((at, min(at, own.randrange(4096))))
        size = own.choice((1, 4, 8, 100))
        if kind == 0:
            data[at] ^= 1 << own.randrange(8)
        elif kind == 1:
            data[at : at + size] = own.randbytes(size)
        elif kind == 2:
            del data[at : at + size]
        elif kind == 3:
            data[at:at] = data[at : at + size]
        else:
            del data[max(1, at) :]
        data = data or bytearray(1)
    return bytes(data)


VALUES = (0, -1, 1, 2, 7, 2**31 - 1, 2**31, 2**63, -(2**70), 0.0, -0.5, 1e308, float("nan"),
          float("inf"), "", "x", "0", "\0", None, True, [], {}, [1], [[1]], {"a": 1})  # fmt: skip


def mutated(own: random.Random, value, depth: int = 0):
    """A JSON value with one place in it replaced, left out or doubled."""
    if isinstance(value, dict) and value and own.random() < 0.95:
        found = dict(value)
        key = own.choice(sorted(found))
        kind = own.randrange(8)
        if kind == 0:
            del found[key]
        elif kind == 1:
            found[own.choice(("other", key + "s"))] = found[key]
        elif kind == 2:
            found[key] = found[own.choice(sorted(found))]
        else:
            found[key] = mutated(own, found[key], depth + 1)
        return found
    if isinstance(value, list) and value and own.random() < 0.9:
        found = list(value)
        at = own.randrange(len(found))
        kind = own.randrange(5)
        if kind == 0:
            del found[at]
        elif kind == 1:
            found.append(found[at])
        else:
            found[at] = mutated(own, found[at], depth + 1)
        return found
    if isinstance(value, int | float) and not isinstance(value, bool) and own.random() < 0.5:
        return own.choice((value + 1, value - 1, -value, value * 2, value * 1000, value / 2))
    return own.choice(VALUES)


class Canaries:
    """Every buffer that torch makes inside lies between bytes that nobody may write."""

    def __init__(self):
        self.kept: list[torch.Tensor] = []
        self.scratch: list[tuple[Layout, torch.Tensor]] = []

    def make(self, shape, dtype) -> torch.Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        base = torch.full((size + 2 * MARGIN,), CANARY, dtype=torch.uint8)
        self.kept.append(base)
        return base[MARGIN : MARGIN + size].view(dtype).view(torch.Size(shape))

    def check(self) -> None:
        for base in self.kept:
            edges = torch.cat([base[:MARGIN], base[-MARGIN:]])
            assert bool((edges == CANARY).all()), "a kernel wrote beside its buffer"
        for layout, memory in self.scratch:
            for first, last in layout.gaps:
                assert bool((memory[first:last] == CANARY).all()), "a kernel left its scratch"
        self.kept.clear()
        self.scratch.clear()

    def lay_out(self, layout: Layout, sizes: dict[str, int]) -> None:
        """In place of `Layout.__init__`: bytes that nobody may write behind each buffer."""
        layout.offsets, layout.gaps, at = {}, [], 0
        for name, size in sizes.items():
            layout.offsets[name] = at
            end = -(-(at + size) // MARGIN) * MARGIN + MARGIN
            layout.gaps.append((at + size, end))
            at = end
        layout.n_bytes = at

    def hold(self, layout: Layout) -> tuple[torch.Tensor, int]:
        """In place of `Layout.held`: memory of this call alone."""
        base = torch.full((layout.n_bytes + MARGIN,), CANARY, dtype=torch.uint8)
        skipped = -base.data_ptr() % MARGIN
        memory = base[skipped : skipped + layout.n_bytes]
        if hasattr(layout, "gaps"):
            self.scratch.append((layout, memory))
        return memory, memory.data_ptr()


@contextmanager
def canaries():
    """Within, `torch.empty`, `torch.zeros`, `empty_like` and `new_empty` give guarded buffers, and
    so does the scratch memory of kernels."""
    found = Canaries()
    before = torch.empty, torch.zeros, torch.empty_like, torch.Tensor.new_empty

    def flat(shape):
        return shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape

    def empty(*shape, dtype=None, **options):
        if options.get("out") is not None or options.get("device") == "meta":
            return before[0](*shape, dtype=dtype, **options)
        return found.make(flat(shape), dtype or torch.get_default_dtype())

    def zeros(*shape, **options):
        return empty(*shape, **options).zero_()

    def empty_like(like, *, dtype=None, **_):
        return found.make(like.shape, dtype or like.dtype)

    def new_empty(like, *shape, dtype=None, **_):
        return found.make(flat(shape), dtype or like.dtype)

    layouts = Layout.__init__, Layout.held
    Layout.__init__ = lambda self, sizes: found.lay_out(self, sizes)
    Layout.held = lambda self: found.hold(self)
    torch.empty, torch.zeros, torch.empty_like = empty, zeros, empty_like
    torch.Tensor.new_empty = new_empty
    try:
        yield found
        found.check()
    finally:
        torch.empty, torch.zeros, torch.empty_like, torch.Tensor.new_empty = before
        Layout.__init__, Layout.held = layouts
