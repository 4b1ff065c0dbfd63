"""Where the time of reading a prompt goes: matrix products, attention, the rest.

    python -m benchmarks.prefill [--model smollm2] [--threads 2] [--tokens 4096]

The same text through transformers' own cache and through ours, in chunks, in float32 and bfloat16.
Beside the seconds stand the rates of both kinds of work, and the rate of one large product of each
dtype on this machine, which is what there is to be had. Figures go to `$OUT`, else to
`benchmarks/results/<device>/prefill.json`, and then into `docs/scale.md`.
"""

import argparse
import time

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache

import saap
from saap import Budget, hf
from saap.eval.corpora import read_named
from saap.eval.tasks.base import text_tokens

from .cpu import cpu_name, environment
from .reports import ROOT, put_table, report_path, write

COMMAND = "python -m benchmarks.prefill"
CHUNK, SIZE = 2048, (2048, 576, 1536)


def read(model, tokens, ours: bool) -> dict:
    """Seconds of reading, all in all and in the two kinds of operations."""
    with (
        saap.attached(model, budget=Budget(max_tokens=512)) as attached,
        profile(activities=[ProfilerActivity.CPU]) as watched,
        torch.no_grad(),
    ):
        cache = attached.cache(len(tokens)) if ours else DynamicCache(config=model.config)
        began = time.perf_counter()
        for part in tokens[None].split(CHUNK, 1):
            model(part, **hf.over(cache), logits_to_keep=1)
        found = {"seconds": time.perf_counter() - began, "products": 0.0, "attention": 0.0}
    for event in watched.key_averages():
        for kind, names in (("products", ("aten::mm", "aten::addmm")), ("attention", ("flash",))):
            if any(name == event.key or name in event.key for name in names):
                found[kind] += event.self_cpu_time_total / 1e6
    return found


def work_of(model, n: int) -> dict[str, float]:
    """Floating-point operations in 10^9: products of the layers, attention below the diagonal."""
    config = model.config.get_text_config()
    weights = sum(p.numel() for layer in model.model.layers for p in layer.parameters())
    width = config.num_attention_heads * getattr(config, "head_dim", 64)
    return {
        "products": 2e-9 * weights * n,
        "attention": 1e-9 * 2 * n * n * width * config.num_hidden_layers,
    }


def peak(dtype: torch.dtype) -> float:
    """10^9 operations a second of one large product."""
    m, k, n = SIZE
    a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    best = float("inf")
    for _ in range(8):
        began = time.perf_counter()
        torch.nn.functional.linear(a, b)
        best = min(best, time.perf_counter() - began)
    return 2e-9 * m * k * n / best


def table(records: list[dict]) -> str:
    lines = [
        "| dtype | cache | reading | matrix products | attention | a large product alone |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for r in records:
        rates = {kind: r["work"][kind] / r[kind] for kind in ("products", "attention")}
        lines.append(
            f"| {r['dtype']} | {'ours' if r['ours'] else 'transformers'} | {r['seconds']:.1f} s | "
            f"{r['products']:.1f} s, {rates['products']:.0f} GFLOP/s | "
            f"{r['attention']:.1f} s, {rates['attention']:.0f} GFLOP/s | "
            f"{r['peak']:.0f} GFLOP/s |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = hf.load_model(options.model), hf.load_tokenizer(options.model)
    text = b"\n".join(read_named("prose2"))
    tokens = text_tokens(tokenizer, text, options.tokens, 0, 1)
    records = []
    for dtype in (torch.float32, torch.bfloat16):
        model = model.to(dtype)
        read(model, tokens[:CHUNK], True)
        for ours in (False, True):
            record = {"dtype": str(dtype).removeprefix("torch."), "ours": ours}
            record |= {"peak": peak(dtype), "work": work_of(model, len(tokens))}
            records.append(record | read(model, tokens, ours))
            print(records[-1], flush=True)
    report = {"environment": environment(), "threads": options.threads, "records": records}
    write(report_path(cpu_name(), "prefill.json"), report)
    put_table(ROOT / "docs" / "scale.md", COMMAND, table(records))
    print(table(records))


if __name__ == "__main__":
    main()
