"""What `benchmarks.cpu` times: dense, selected and ragged attention of Llama-3-8B's heads."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from saap import attend_dense, attend_ranges

from .cpu_timing import Call, Reader, cold_bytes, take_turns
from .workloads import bucket_lists, padded, ragged_lengths

Q_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
SHARES = (0.01, 0.02, 0.05, 0.1)
RAGGED_BATCH = 8
MAX_NLIST, ROWS_PER_BUCKET = 1024, 32
MAX_CALLS = 64


@dataclass
class Bench:
    """One random store, of which every shape is a view, and the raw records.

    Attributes:
        k, v: `[elements]`, float32, as large as the largest store.
        seconds: how long a section takes turns.
        shrink: divides all row counts, for a rehearsal.
    """

    seconds: float
    shrink: int = 1
    records: list[dict[str, Any]] = field(default_factory=list)
    reader: Reader = field(default_factory=Reader)
    draw: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def __post_init__(self):
        torch.manual_seed(0)
        self.lengths = ragged_lengths(RAGGED_BATCH, 1024 // self.shrink, 131072 // self.shrink)
        rows = max(131072 // self.shrink, int(self.lengths.sum()))
        self.k, self.v = torch.randn(2, KV_HEADS * rows * HEAD_DIM)

    def stores(self, rows: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Disjoint `[1, Hkv, rows, D]`, as many as a pass needs to be larger than the caches."""
        size = KV_HEADS * rows * HEAD_DIM
        wanted = -(-cold_bytes() // (2 * size * dtype.itemsize))
        count = max(1, min(wanted, self.k.numel() // size))
        shape = (1, KV_HEADS, rows, HEAD_DIM)
        return [
            tuple(x[i * size : (i + 1) * size].view(shape).to(dtype) for x in (self.k, self.v))
            for i in range(count)
        ]

    def compare(self, passes: dict[str, list[Call]], nbytes: dict[str, float], **shape: Any):
        """Times all passes in turns; `nbytes` of K and V that one call reads."""
        for name, ms in take_turns(passes, self.seconds).items():
            self.records.append({**shape, "impl": name, "bytes": round(nbytes[name]), "ms": ms})


def queries(batch: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(batch, Q_HEADS, HEAD_DIM).to(dtype)


def sdpa_packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The query heads of a KV head as the query length of one head: the fair dense baseline."""
    return sdpa(q.view(*k.shape[:2], -1, k.shape[3]), k, v).view(q.shape)


def sdpa_gqa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What transformers calls: the weaker baseline."""
    return sdpa(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]


def selections(bench: Bench, rows: int, share: float, size: int) -> list[tuple[Tensor, Tensor]]:
    """Different ones, as many as make a pass larger than the caches, of `size` bytes per row."""
    nlist = max(1, min(MAX_NLIST, rows // ROWS_PER_BUCKET))
    wanted = int(share * rows)
    count = max(1, min(MAX_CALLS, -(-cold_bytes() // max(1, wanted * KV_HEADS * size))))
    lists = [bucket_lists(bench.draw, KV_HEADS, nlist, 0, rows, wanted) for _ in range(count)]
    return [tuple(torch.from_numpy(padded(x))[None] for x in both) for both in lists]


def dense_and_selected(bench: Bench, rows: int, dtype: torch.dtype) -> None:
    """Ours dense and over 1 to 10 % of the rows, SDPA dense, and a plain read of K and V."""
    rows //= bench.shrink
    stores = bench.stores(rows, dtype)
    q = queries(1, dtype)
    seqlens = torch.tensor([rows], dtype=torch.int32)
    row_bytes = 2 * HEAD_DIM * dtype.itemsize
    whole = KV_HEADS * rows * row_bytes
    shape = {"section": "dense", "storage": str(dtype).removeprefix("torch."), "rows": rows}
    check(shape, attend_dense(q, *stores[0], seqlens)[0], sdpa_packed(q, *stores[0]))

    passes = {
        **bench.reader.calls(stores),
        "saap dense": [lambda k=k, v=v: attend_dense(q, k, v, seqlens) for k, v in stores],
        "sdpa packed": [lambda k=k, v=v: sdpa_packed(q, k, v) for k, v in stores],
        "sdpa gqa": [lambda k=k, v=v: sdpa_gqa(q, k, v) for k, v in stores],
    }
    nbytes = dict.fromkeys(passes, whole)
    for share in SHARES:
        name = f"saap {share:.0%}"
        chosen = selections(bench, rows, share, row_bytes)
        passes[name] = [
            lambda k=k, v=v, starts=starts, lengths=lengths: attend_ranges(
                q, k, v, starts, lengths
            )
            for (k, v), (starts, lengths) in zip(_cycle(stores, len(chosen)), chosen, strict=True)
        ]
        nbytes[name] = sum(int(x.sum()) for _, x in chosen) / len(chosen) * row_bytes
        check(
            {**shape, "share": share},
            attend_ranges(q, *stores[0], *chosen[0])[0],
            attend_ranges(q, *stores[0], *chosen[0], impl="reference")[0],
        )
    bench.compare(passes, nbytes, **shape)


def ragged(bench: Bench, dtype: torch.dtype) -> None:
    """A batch of unequal lengths against one of equal lengths, with as many tokens.

    Sequences lie end to end in one store, which both batches read to the last row.
    """
    lengths = bench.lengths
    total = int(lengths.sum())
    equal = np.diff(np.arange(RAGGED_BATCH + 1) * total // RAGGED_BATCH)
    k, v = bench.stores(total, dtype)[0]
    q = queries(RAGGED_BATCH, dtype)
    passes = bench.reader.calls([(k, v)])
    for name, sizes in (("ragged", lengths), ("uniform", equal)):
        begins = np.cumsum(sizes) - sizes
        starts, counts = (
            torch.from_numpy(x.astype(np.int32))[:, None, None].expand(-1, KV_HEADS, 1)
            for x in (begins, sizes)
        )
        batched = [x.expand(RAGGED_BATCH, -1, -1, -1) for x in (k, v)]
        pieces = list(zip(begins.tolist(), (begins + sizes).tolist(), strict=True))

        def ours(batched=batched, starts=starts, counts=counts) -> Tensor:
            return attend_ranges(q, *batched, starts, counts)[0]

        def each(pieces=pieces) -> Tensor:
            return torch.cat(
                [
                    sdpa_packed(q[i : i + 1], k[:, :, a:b], v[:, :, a:b])
                    for i, (a, b) in enumerate(pieces)
                ]
            )

        check({"section": name}, ours(), each())
        passes |= {f"saap {name}": [ours], f"sdpa packed, each, {name}": [each]}
    nbytes = dict.fromkeys(passes, 2 * k.nbytes)
    storage = str(dtype).removeprefix("torch.")
    shape = {"section": "ragged", "storage": storage, "lengths": lengths.tolist()}
    bench.compare(passes, nbytes, **shape)


def check(shape: dict[str, Any], ours: Tensor, other: Tensor) -> None:
    """No time is reported of outputs that differ.

    Raises:
        ArithmeticError: ‖ours - other‖ is more than 64 roundings of ‖other‖.
    """
    difference = float((ours.double() - other.double()).norm() / other.double().norm())
    if not difference <= 64 * torch.finfo(ours.dtype).eps:
        raise ArithmeticError(f"{shape}: the output differs by {difference:.1e} from its peer's")


def _cycle(items: Sequence[Any], count: int) -> list[Any]:
    return [items[i % len(items)] for i in range(count)]
