"""What a whole step of a KV store costs on a GPU: rows written, rows chosen, attention."""

import statistics
from typing import Any

import torch

from saap.budget import Budget
from saap.kv import KVStore
from saap.methods import find_method
from saap.selector import LayerInfo

from .gpu_sections import HEAD_DIM, KV_HEADS, SCALE, Bench
from .gpu_timing import step_seconds

WARM, STEPS, TURNS, PROFILED = 8, 40, 5, 4


def step(bench: Bench, batch: int, context: str, share: float | None, method: str) -> None:
    """`share` of the rows visited, sinks and tail counted in; None with method "dense"."""
    rows = bench.context(context)
    shape = {"batch": batch, "context": context, "rows": rows, "share": share}
    if not bench.room("step", (batch, KV_HEADS, rows, HEAD_DIM), **shape):
        return
    record: dict[str, Any] = {"section": "step", "impl": f"saap-{method}", **shape}
    bench.records.append(record)
    try:
        store = filled(bench, batch, rows, share, method)
        record |= timed(bench, store, batch)
    except (RuntimeError, ValueError, MemoryError) as failure:
        record["failed"] = f"{type(failure).__name__}: {str(failure)[:300]}"


def filled(bench: Bench, batch: int, rows: int, share: float | None, method: str) -> KVStore:
    """Random rows, which are no friends of a choice: heads of a group want different ones."""
    layer = LayerInfo(SCALE, device=bench.device)
    if share is None:
        budget = Budget(max_tokens=0)
    else:
        share = share if bench.shrink == 1 else 0.5
        budget = Budget.for_selectivity(share, rows, n_sink=16, window=256 // bench.shrink or 1)
    selector = find_method(method)(None).selector(layer)
    store = KVStore(selector, budget, capacity=rows + 1024)
    (k, v), *_ = bench.pool.views(batch, KV_HEADS, rows, HEAD_DIM)
    store.append(k, v, k)
    store.flush()
    return store


def timed(bench: Bench, store: KVStore, batch: int) -> dict[str, Any]:
    """Median microseconds a step, the host's work counted in, over turns of many steps; and how
    long kernels of a step ran, which is what is left where the host is ahead."""
    on_gpu = bench.device.type == "cuda"
    many = {"warm": WARM, "turns": TURNS, "steps": STEPS}

    def once() -> None:
        q = bench.queries(batch).unsqueeze(2)
        k = q[:, ::4]
        store.step(k, k, k, q, q, sm_scale=SCALE)

    many = many if on_gpu else dict.fromkeys(many, 1)
    found = [1e6 * seconds for seconds in step_seconds(once, bench.device, **many)]
    record = {
        "us": statistics.median(found), "raw_us": found, "visited_share": store.visited_share,
        "lengths": store.lengths[:1],
    }  # fmt: skip
    return record | (kernel_times(once) if on_gpu else {})


def kernel_times(once) -> dict[str, Any]:
    """Microseconds of all kernels in a step, by name, and how many there are."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            once()
        torch.cuda.synchronize()
    spent: dict[str, float] = {}
    count = 0
    for event in profiler.events():
        took = event.device_time_total
        if took:
            spent[event.name[:60]] = spent.get(event.name[:60], 0.0) + took / PROFILED
            count += 1
    largest = sorted(spent.items(), key=lambda pair: -pair[1])[:12]
    return {
        "kernel_us": sum(spent.values()), "kernels": count / PROFILED, "by_kernel": dict(largest)
    }  # fmt: skip
