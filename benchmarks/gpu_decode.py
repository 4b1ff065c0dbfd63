"""Time per generated token on a GPU: dense attention against Saap, in the model that runs.

    python -m benchmarks.gpu_decode [--layers 8] [--cases 1x32k,1x128k,4x128k,8x32k]

Random weights of Llama-3-8B's shape in bfloat16, cut to so many layers and a small vocabulary;
caches of random keys and values. One way after the other, in turns of steps that follow one
another:

- `transformers`: its own SDPA over its `DynamicCache`, which copies the cache for every token;
- `transformers-flash`: the same with SDPA's flash back-end alone allowed;
- `packed`: flash SDPA with the query heads of a group packed as query rows, over a cache written
  in place;
- `saap-dense`, `saap`: `saap.attached` with these methods; the first is our kernel over all rows.

JSON goes to `$OUT` or `benchmarks/results/<device>/gpu_decode.json`.
"""

import argparse
import contextlib
import functools
import gc
import statistics
import sys
import time

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

import saap
from saap.budget import Budget
from saap.hf import over

from .decode import InPlaceLayer, filled
from .gpu import environment
from .gpu_timing import step_seconds, wait
from .reports import report_path, write

TURNS, STEPS, WARM = 5, 12, 6


def llama_8b(n_layers: int, device, dtype) -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=4096, intermediate_size=14336, num_hidden_layers=n_layers,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        max_position_embeddings=140_000,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def measure(model, batch: int, context: int, budget: Budget) -> dict:
    device = next(model.parameters()).device
    layers = [
        torch.randn(2, batch, 8, context, 128, device=device, dtype=torch.bfloat16)
        for _ in range(model.config.num_hidden_layers)
    ]
    token = torch.full((batch, 1), 5, device=device)
    own = model.config._attn_implementation
    dense = DynamicCache(config=model.config)
    dense.layers = [InPlaceLayer(k, v) for k, v in layers]

    def packed():
        model.config._attn_implementation = "packed_sdpa"
        try:
            with flash(device):
                model(token, **over(dense))
        finally:
            model.config._attn_implementation = own

    record = {"batch": batch, "context": context, "ms": {}, "raw_ms": {}}
    with torch.no_grad():
        timed(record, "packed", packed)
        dense.layers.clear()
        free()
        plain = DynamicCache(config=model.config)
        for number, (k, v) in enumerate(layers):
            plain.update(k, v, number)
        as_it_comes = functools.partial(model, token, **over(plain))
        timed(record, "transformers", as_it_comes, steps=4)

        def by_flash(step=as_it_comes):
            with flash(device):
                step()

        timed(record, "transformers-flash", by_flash, steps=4)
        del plain, as_it_comes, by_flash
        free()
        for name, method in (("saap-dense", "dense"), ("saap", "saap")):
            with saap.attached(model, None, budget, method=method) as saap_model:
                begin = time.perf_counter()
                cache = filled(saap_model, layers, context)
                step = functools.partial(model, token, **over(cache))
                step()
                wait(device)
                record.setdefault("made_s", {})[name] = time.perf_counter() - begin
                timed(record, name, step)
                record.setdefault("visited_share", {})[name] = cache.visited_share
                del cache, step
            free()
    return record


def flash(device):
    """The back-end of SDPA that does not make a plan anew for each length, as cuDNN's does."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION])


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def timed(record: dict, name: str, step, steps: int = STEPS) -> None:
    """Median milliseconds of steps that follow one another, over turns."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        seconds = step_seconds(step, device, warm=WARM, turns=TURNS, steps=steps)
    except (RuntimeError, ValueError, MemoryError) as failure:
        record["ms"][name] = None
        record.setdefault("failed", {})[name] = f"{type(failure).__name__}: {str(failure)[:300]}"
        return
    found = [1e3 * own for own in seconds]
    record["ms"][name], record["raw_ms"][name] = statistics.median(found), found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--cases", default="1x32k,1x128k,4x128k,8x32k")
    parser.add_argument("--budget", type=int, default=4096, help="rows of the middle per step")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = llama_8b(options.layers, device, torch.bfloat16)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "rehearsal"
    path = report_path(name, "gpu_decode.json")
    report = {"environment": environment(device), "layers": options.layers, "records": []}
    for case in options.cases.split(","):
        batch, context = case.split("x")
        context = int(context.removesuffix("k")) * (1024 if context.endswith("k") else 1)
        record = measure(model, int(batch), context, Budget(max_tokens=options.budget))
        report["records"].append(record)
        write(path, report)
        times = ", ".join(f"{way} {ms and round(ms, 2)}" for way, ms in record["ms"].items())
        print(f"{case}: ms a step: {times}; {record.get('failed', '')}", flush=True)
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
