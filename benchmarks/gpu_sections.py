"""What `benchmarks.gpu` times: dense, ragged and selected attention of Llama-3-8B's heads."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saap.kernels.attention import triton as backend
from saap.kernels.codes import Codes, QueryMap, coordinates_for, select_rows

from . import gpu_peers as peers
from . import workloads
from .gpu_timing import Call, Pool, host_us, time_calls

Q_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
SCALE = HEAD_DIM**-0.5
NLIST = 1024
SINKS, WINDOW = 16, 2047


@dataclass
class Bench:
    """Device, stores and the list of raw records that the sections append to.

    Attributes:
        shrink: divides all row counts: 1, but in a rehearsal on the CPU.
        left_s: seconds that the section may still take.
    """

    device: torch.device
    dtype: torch.dtype
    pool: Pool
    copy_gbps: float
    shrink: int
    left_s: Callable[[], float]
    records: list[dict[str, Any]] = field(default_factory=list)
    draw: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def context(self, name: str) -> int:
        """Rows of "8k" to "512k"; "171k", the context that Saap was timed at, is 171,008."""
        thousands = 167 if name == "171k" else int(name.removesuffix("k"))
        return thousands * 1024 // self.shrink

    def queries(self, batch: int) -> Tensor:
        q = torch.randn(batch, Q_HEADS, HEAD_DIM, device=self.device)
        return q.to(self.dtype)

    def ranges(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32)).to(self.device)

    def time(self, section: str, impl: str, calls: list[Call], read: int, **shape: Any) -> None:
        """Times `calls` that read `read` rows each, summed over batch and KV heads."""
        record = {"section": section, "impl": impl, **shape}
        try:
            ms, graph = time_calls(calls, self.device)
        except (RuntimeError, ValueError, NotImplementedError, ImportError) as failure:
            record["failed"] = f"{type(failure).__name__}: {str(failure)[:200]}"
        else:
            size = shape.get("bytes_per_element", self.pool.k.element_size())
            read_bytes = 2 * read * HEAD_DIM * size
            gbps = read_bytes / ms / 1e6
            record |= {"ms": ms, "timed": "graph" if graph else "eager", "bytes": read_bytes}
            record |= {"gbps": gbps, "of_copy": gbps / self.copy_gbps}
        self.records.append(record)

    def time_peers(
        self,
        section: str,
        known: dict[str, peers.Peer],
        inputs: tuple[Tensor, list[tuple[Tensor, Tensor]], Tensor | None],
        read: int,
        **shape: Any,
    ) -> None:
        """`inputs`: q, stores and the lengths of a ragged batch."""
        q, stores, lengths = inputs
        for name, build in known.items():
            try:
                calls = [build(q, k, v, lengths) for k, v in stores]
            except (peers.Unavailable, RuntimeError, ValueError, TypeError) as failure:
                reason = f"{type(failure).__name__}: {str(failure)[:200]}"
                self.records.append({"section": section, "impl": name, **shape, "failed": reason})
            else:
                self.time(section, name, calls, read, **shape)

    def room(self, section: str, store: tuple[int, ...], **shape: Any) -> bool:
        """Whether the pool holds the store and there is time left; notes it if not."""
        reason = None
        if not self.pool.holds(*store):
            reason = "larger than the pool"
        elif self.left_s() < 3:
            reason = "no time left"
        if reason:
            self.records.append({"section": section, **shape, "failed": reason})
        return reason is None


def ours(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, lengths: Tensor, **options: Any) -> Call:
    """A step with a workspace of its own; `options` with `plan` go to the workspace."""
    making = {name: options.pop(name) for name in ("mode", "plan", "programs") if name in options}
    workspace = backend.make_workspace(q, k, starts, **making)
    return lambda: backend.attend_ranges(
        q, k, v, starts, lengths, sm_scale=SCALE, workspace=workspace, **options
    )


def dense_ranges(bench: Bench, lengths: np.ndarray) -> tuple[Tensor, Tensor]:
    lengths = bench.ranges(lengths)[:, None, None].expand(-1, KV_HEADS, 1)
    return torch.zeros_like(lengths), lengths


def dense(bench: Bench, grid: list[tuple[int, str]], known: dict[str, peers.Peer]) -> None:
    """Uniform batches, against the peers in `known`; `grid` of (batch, context)."""
    for batch, context in grid:
        rows = bench.context(context)
        store = (batch, KV_HEADS, rows, HEAD_DIM)
        shape = {"batch": batch, "context": context, "rows": rows}
        if not bench.room("dense", store, **shape):
            continue
        q, stores = bench.queries(batch), bench.pool.views(*store)
        starts, lengths = dense_ranges(bench, np.full(batch, rows))
        total = batch * KV_HEADS * rows
        for name, options in (("saap", {}), ("saap-one-program-a-group", {"mode": "group"})):
            calls = [ours(q, k, v, starts, lengths, **options) for k, v in stores]
            bench.time("dense", name, calls, total, **shape)
        ours_at = len(bench.records) - 2
        bench.time_peers("dense", known, (q, stores, None), total, **shape)
        bench.records[ours_at]["difference"] = difference(q, stores[0], starts, lengths)


def difference(q: Tensor, store: tuple, starts: Tensor, lengths: Tensor) -> float:
    """‖ours - packed SDPA‖ / ‖packed SDPA‖ over a uniform batch: that the same was computed."""
    k, v = store
    out = ours(q, k, v, starts, lengths)()[0].float()
    packed = q.view(len(k), KV_HEADS, -1, HEAD_DIM)
    other = peers.sdpa(packed, k, v).reshape(q.shape).float()
    return float((out - other).norm() / other.norm())


def ragged_lengths(bench: Bench, batch: int) -> np.ndarray:
    """Log-uniform from 1k to 128k; the same for the same batch."""
    longest = bench.context("128k")
    return workloads.ragged_lengths(batch, longest // 128, longest)


def ragged(bench: Bench, batches: list[int], known: dict[str, peers.Peer]) -> None:
    """Ragged batches in a store as long as the longest, against the peers in `known`."""
    for batch in batches:
        lengths = ragged_lengths(bench, batch)
        store = (batch, KV_HEADS, int(lengths.max()), HEAD_DIM)
        shape = {"batch": batch, "rows": store[2], "mean_rows": float(lengths.mean())}
        if not bench.room("ragged", store, **shape):
            continue
        q, stores = bench.queries(batch), bench.pool.views(*store)
        starts, held = dense_ranges(bench, lengths)
        total = KV_HEADS * int(lengths.sum())
        for name, options in (("saap", {}), ("saap-one-program-a-group", {"mode": "group"})):
            calls = [ours(q, k, v, starts, held, **options) for k, v in stores]
            bench.time("ragged", name, calls, total, **shape)
        seqlens = bench.ranges(lengths)
        # Bytes that the ragged batch needs, also for the peers that read the padding.
        bench.time_peers("ragged", known, (q, stores, seqlens), total, **shape)


def bucket_lists(
    bench: Bench, lists: int, rows: int, selected: int, edges: bool
) -> tuple[np.ndarray, np.ndarray]:
    """`lists` selections of about `selected` rows in whole buckets of log-normal size.

    `edges`: sinks and the recent window are two more ranges, counted in.
    """
    first = -(-SINKS // bench.shrink) if edges else 0
    last = rows - WINDOW // bench.shrink if edges else rows
    wanted = selected - (rows - last + first)
    starts, lengths = workloads.bucket_lists(bench.draw, lists, NLIST, first, last, wanted)
    if edges:
        starts = [np.concatenate([[0, last], x]) for x in starts]
        lengths = [np.concatenate([[first, rows - last], x]) for x in lengths]
    return workloads.padded(starts), workloads.padded(lengths)


def selection(bench: Bench, batch: int, context: str, share: float, edges: bool = False) -> None:
    """`share` of the rows in buckets, another selection for each (batch, KV head) and pass."""
    rows = bench.context(context)
    store = (batch, KV_HEADS, rows, HEAD_DIM)
    shape = {"batch": batch, "context": context, "rows": rows, "share": share, "edges": edges}
    if not bench.room("selection", store, **shape):
        return
    q, stores = bench.queries(batch), bench.pool.views(*store)
    read_bytes = share * 2 * q.element_size() * batch * KV_HEADS * rows * HEAD_DIM
    passes = max(len(stores), min(round(bench.pool.cold_bytes / read_bytes), 24))
    calls, total = [], 0
    for i in range(passes):
        arrays = bucket_lists(bench, batch * KV_HEADS, rows, int(share * rows), edges)
        total += int(arrays[1].sum())
        starts, lengths = (bench.ranges(x).view(batch, KV_HEADS, -1) for x in arrays)
        calls.append(ours(q, *stores[i % len(stores)], starts, lengths))
    shape["ranges"] = starts.shape[-1]
    bench.time("selection", "saap", calls, total // len(calls), **shape)


def single_tokens(bench: Bench, context: str, share: float) -> None:
    """As many rows as `selection`, each a range of its own: what bucket order is worth."""
    rows = bench.context(context)
    count = int(share * rows)
    q, (k, v) = bench.queries(1), bench.pool.views(1, KV_HEADS, rows, HEAD_DIM)[0]
    calls = []
    for _ in range(4):
        starts = np.stack([bench.draw.permutation(rows)[:count] for _ in range(KV_HEADS)])[None]
        lengths = np.ones_like(starts)
        calls.append(ours(q, k, v, bench.ranges(starts), bench.ranges(lengths)))
    shape = {"batch": 1, "context": context, "rows": rows, "share": share}
    bench.time("single-tokens", "saap", calls, KV_HEADS * count, **shape)


def eight_bits(bench: Bench, context: str) -> None:
    """Dense with int8 and, where the GPU has it, fp8 storage, one scale a row."""
    rows = bench.context(context)
    store = (1, KV_HEADS, rows, HEAD_DIM)
    q, stores = bench.queries(1), bench.pool.views(*store)
    starts, lengths = dense_ranges(bench, np.full(1, rows))
    scale = torch.full(store[:3], 1 / 32, device=bench.device)
    shape = {"batch": 1, "context": context, "rows": rows, "bytes_per_element": 1}
    for dtype in (torch.int8, torch.float8_e4m3fn):
        held = [tuple((x * 32).clamp(-127, 127).to(dtype) for x in kv) for kv in stores]
        calls = [ours(q, *kv, starts, lengths, k_scale=scale, v_scale=scale) for kv in held]
        shape = {
            "batch": 1,
            "context": context,
            "rows": rows,
            "bytes_per_element": 1,
            "storage": str(dtype),
        }
        bench.time("eight-bits", "saap", calls, KV_HEADS * rows, **shape)


def choice(bench: Bench, batch: int, context: str) -> None:
    """What `saap` adds to a step: the choice of 4,096 rows by codes, coarse and then whole."""
    rows, device, coordinates = bench.context(context), bench.device, coordinates_for(HEAD_DIM)
    shapes = Codes.shapes(batch, KV_HEADS, coordinates, rows)
    budget = min(4096, rows // 4)
    calls = []
    for _ in range(2):
        words = (
            torch.randint(-(2**31), 2**31, shapes[name][0], device=device).int()
            for name in ("coarse", "fine")
        )
        scale = torch.full(shapes["scale"][0], 128, dtype=torch.uint8, device=device)
        codes = Codes(*words, scale)
        out = tuple(torch.zeros(2, batch, KV_HEADS, budget, dtype=torch.int32, device=device))
        scored = torch.zeros(batch, KV_HEADS, dtype=torch.int64, device=device)
        q = bench.queries(batch).float() / 16
        matrix = torch.randn(1, KV_HEADS, coordinates, HEAD_DIM, device=device)
        options = {"query_map": QueryMap.of(matrix / HEAD_DIM**0.5), "impl": "triton"}

        def call(q=q, codes=codes, out=out, scored=scored, options=options) -> None:
            select_rows(
                q, codes, [rows] * batch, max_tokens=budget, n_candidates=2 * budget, out=out,
                scored=scored, **options,
            )  # fmt: skip

        calls.append(call)
    record = {"section": "choice", "impl": "saap", "batch": batch, "context": context}
    try:
        ms, graph = time_calls(calls, bench.device)
    except (RuntimeError, ValueError) as failure:
        record["failed"] = f"{type(failure).__name__}: {str(failure)[:200]}"
    else:
        scanned = batch * KV_HEADS * rows * codes.coarse_bytes
        record |= {"ms": ms, "timed": "graph" if graph else "eager", "bytes": scanned}
        record |= {"gbps": scanned / ms / 1e6}
    bench.records.append(record)


def host_time(bench: Bench, context: str) -> None:
    """What an eager step costs the host, without a graph."""
    rows = bench.context(context)
    q, (k, v) = bench.queries(1), bench.pool.views(1, KV_HEADS, rows, HEAD_DIM)[0]
    arrays = bucket_lists(bench, KV_HEADS, rows, rows // 20, False)
    starts, lengths = (bench.ranges(x).view(1, KV_HEADS, -1) for x in arrays)
    call = ours(q, k, v, starts, lengths)
    record = {"section": "host", "impl": "saap", "us": host_us(call, bench.device)}
    bench.records.append(record)
