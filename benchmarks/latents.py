"""Time per token of a model whose layers keep latents (MLA), over transformers' cache and ours.

    python -m benchmarks.latents [--contexts 8192,32768] [--seconds 20]

Random weights of DeepSeek-V2-Lite's shape, cut to two layers without experts and a small
vocabulary; random latents. transformers expands those of all tokens to keys and values of every
head at each step. `dense` attends to all rows of our store, `saap` to 5 % of them: both over
latents as they are. Each takes turns with transformers. Figures go to `$OUT`, else to
`benchmarks/results/<device>/latents.json` and into `docs/decode.md`.
"""

import argparse
import statistics
from functools import partial

import torch
import transformers
from transformers import DynamicCache

import saap
from saap import hf
from saap.budget import Budget
from saap.hf import latent
from saap.index.moments import MOST_OBSERVED

from .cpu import cpu_name, environment
from .cpu_timing import load, paired_ratio, take_turns
from .decode import filled
from .reports import ROOT, markdown, put_table, report_path, write

COMMAND = "python -m benchmarks.latents"
SHARE = 0.05
STEPS_A_TURN = 8
RANK, ROTATED = 512, 64


def deepseek_v2_lite_two_layers():
    config = transformers.DeepseekV2Config(
        vocab_size=1024,
        hidden_size=2048,
        intermediate_size=10944,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=16,
        q_lora_rank=None,
        kv_lora_rank=RANK,
        qk_nope_head_dim=128,
        qk_rope_head_dim=ROTATED,
        v_head_dim=128,
        first_k_dense_replace=2,
        max_position_embeddings=163840,
    )
    torch.manual_seed(0)
    return transformers.DeepseekV2ForCausalLM(config).eval()


def read(saap_model, rows: torch.Tensor, context: int):
    """A cache whose layers hold these rows `[1, 1, N, D]`, with queries to learn from."""
    n_layers = saap_model.model.config.num_hidden_layers
    cache = filled(saap_model, [(rows, rows)] * n_layers, context)
    shape = 1, saap_model.model.config.num_attention_heads, MOST_OBSERVED, rows.shape[3]
    for layer in cache.saap_layers:
        if layer.store.selector is not None:
            layer.store.selector.observe(torch.randn(shape), [MOST_OBSERVED])
    return cache


@torch.no_grad()
def measure(model, context: int, seconds: float) -> dict:
    rows = torch.randn(1, 1, context, RANK + ROTATED)
    plain, token = DynamicCache(config=model.config), torch.tensor([[5]])
    for number in range(model.config.num_hidden_layers):
        plain.update(*latent.parted(model.config, rows), number)
    ways = {"dense": None, "saap": Budget(max_tokens=round(SHARE * context))}
    record = {"context": context}
    for method, budget in ways.items():
        with saap.attached(model, budget=budget, method=method) as saap_model:
            cache = read(saap_model, rows, context)
            turns = {
                method: [partial(model, token, **hf.over(cache))] * STEPS_A_TURN,
                "transformers": [partial(model, token, **hf.over(plain))],
            }
            spent = take_turns(turns, seconds)
            record[method] = {
                "ms": {name: statistics.median(ms) for name, ms in spent.items()},
                "speedup": paired_ratio(spent["transformers"], spent[method]),
                "visited": cache.visited_share,
                "cache_bytes": cache.nbytes,
            }
        print(context, method, record[method], flush=True)
    return record


def table(records: list[dict]) -> str:
    head = ["context", "transformers, ms", "dense, ms", "`saap` at 5 %, ms", "dense", "`saap`"]
    rows = []
    for r in records:
        times = [
            r["dense"]["ms"]["transformers"],
            r["dense"]["ms"]["dense"],
            r["saap"]["ms"]["saap"],
        ]
        ratios = [f"{r[name]['speedup']:.0f}x" for name in ("dense", "saap")]
        rows.append([f"{r['context']:,}", *(f"{ms:,.0f}" for ms in times), *ratios])
    return markdown(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", default="8192,32768")
    parser.add_argument("--seconds", type=float, default=20, help="of turns for each way")
    options = parser.parse_args()
    model = deepseek_v2_lite_two_layers()
    contexts = [int(n) for n in options.contexts.split(",")]
    records = [measure(model, context, options.seconds) for context in contexts]
    report = {"environment": environment(), "load": load(), "records": records}
    write(report_path(cpu_name(), "latents.json"), report)
    put_table(ROOT / "docs" / "decode.md", COMMAND, table(records))


if __name__ == "__main__":
    main()
