"""What training costs: seconds per head, of the reference model and of a Llama-3-8B layer.

    python -m benchmarks.training                    # here: a small part of the large layer
    python -m benchmarks.training --device cuda --texts 24 --steps 400 --dtype bfloat16

The reference model is trained as the demo does, all heads. The large layer (hidden 4096, 32 query
and 8 KV heads of 128, nlist 1024) has random weights: right for time, no measure of recall. It is
trained on `--texts` sequences in `--steps` optimiser steps, by the same code; each stage is then
scaled to 24 sequences and 400 steps by what it is proportional to, and the layer to 32 layers.
`measured` and `scaled` say which is which; `forward`, running the layer itself, is told apart.
Seconds are on the clock, and as time on the cores (`_cpu`), which is what to read on a shared
machine, with OMP_NUM_THREADS=1 (waiting threads take core time too). JSON goes to `$OUT`, else to
`benchmarks/results/<device>/training.json`.
"""

import argparse
import json
import resource
from collections import defaultdict

import torch

from saap import hf
from saap.eval import reference
from saap.eval.cli.demo import training_sequences
from saap.hf.layerwise import LayerStream
from saap.training import TrainingOptions, prepare, run
from saap.training.hidden import HiddenInMemory
from saap.training.layer import pass_through, train_layer
from saap.training.plan import KEY_SAMPLE, KEY_SEQUENCES

from .cpu import cpu_name, environment
from .cpu_timing import load
from .index import Clock
from .reports import report_path, write

CONTEXT, TEXTS, STEPS, LAYERS = 8192, 24, 400, 32
HEADS, KV_HEADS = 32, 8


class Stages:
    """Wall and core seconds of each stage, from the reports of a training."""

    def __init__(self):
        self.wall, self.cpu = defaultdict(float), defaultdict(float)
        self._stage = self._clock = None

    def __call__(self, stage: str, _=None) -> None:
        self.stop()
        self._stage = stage.split(",")[0]
        self._clock = Clock().__enter__()

    def progress(self, what: str, *_) -> None:
        """For `saap.train`, whose progress names the stage in brackets."""
        self(what.split(": ")[-1].rstrip(")") if ": " in what else "end")

    def stop(self) -> None:
        if self._clock is not None:
            self._clock.__exit__()
            self.wall[self._stage] += self._clock.wall
            self.cpu[self._stage] += self._clock.cpu
        self._clock = None

    def seconds(self) -> dict:
        return {
            name: {"s": round(self.wall[name], 3), "cpu_s": round(self.cpu[name], 3)}
            for name in self.wall
            if name != "end"
        }


def total(stages: dict, unit: str) -> float:
    return sum(stage[unit] for stage in stages.values())


def reference_model(texts: int, device: str) -> dict:
    """The whole training of the reference model, as `saap demo` runs it but for the baselines."""
    model = hf.load_model(reference.FOLDER, device=device)
    tokens = training_sequences(reference.split_held_out()[0], CONTEXT, 0)[:texts]
    training = prepare(model, tokens, TrainingOptions())
    stages = Stages()
    index = run(model, training, progress=stages.progress)
    stages.stop()
    shape = training.description
    heads = shape["num_layers"] * shape["num_heads"]
    found = stages.seconds()
    return {
        "measured": "whole training",
        "texts": texts,
        "context": CONTEXT,
        "layers": shape["num_layers"],
        "query_heads": heads,
        "nlist": index.nlist,
        "stages": found,
        "total_s": total(found, "s"),
        "total_cpu_s": total(found, "cpu_s"),
        "s_a_query_head": total(found, "s") / heads,
        "cpu_s_a_query_head": total(found, "cpu_s") / heads,
        "expected_layer_bytes": training.memory.layer,
    }


def large_layer_model(device: str, dtype: torch.dtype):
    """One decoder layer of Llama-3-8B's shape, random weights, a small vocabulary."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=128,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.LlamaForCausalLM(config).to(dtype).eval()


@torch.no_grad()
def large_layer(texts: int, steps: int, device: str, dtype: torch.dtype) -> dict:
    """Measured stages of one layer, and what they come to for 24 texts, 400 steps, 32 layers."""
    model = large_layer_model(device, dtype)
    tokens = torch.randint(0, 1024, (texts, CONTEXT), generator=torch.Generator().manual_seed(1))
    training = prepare(model, tokens, TrainingOptions(nlist=1024, steps=steps))
    stream, plan = LayerStream(model), training.plan
    stages = Stages()
    train_layer(stream, 0, plan, HiddenInMemory(), training.options, stages, output_needed=False)
    stages.stop()
    one = prepare(model, tokens[:2], TrainingOptions(nlist=1024))
    forward = Stages()
    pass_through(stream, 0, one.plan, HiddenInMemory(), forward)
    forward.stop()
    measured = stages.seconds() | forward.seconds()
    for unit, seconds in measured["masses"].items():
        # Projections were computed for the masses alone here; a training shares the forward's.
        projecting = measured["keys"][unit] / len(plan.key_picks)
        measured["masses"][unit] = round(seconds - texts * projecting, 3)
    n_keys = sum(len(p) for p in plan.key_picks.values())
    factors = {
        "keys": min(TEXTS, KEY_SEQUENCES) / len(plan.key_picks),
        "k-means": KEY_SAMPLE / n_keys,
        "masses": TEXTS / texts,
        "routers": STEPS / steps,
        "forward": TEXTS / 2,
    }
    layer = {
        name: {unit: round(value * factors[name], 2) for unit, value in stage.items()}
        for name, stage in measured.items()
    }
    own = {name: stage for name, stage in layer.items() if name != "forward"}
    return {
        "shape": {"hidden": 4096, "query_heads": HEADS, "kv_heads": KV_HEADS, "head_dim": 128,
                  "nlist": 1024, "context": CONTEXT},
        "measured": {"texts": texts, "steps": steps, "queries": plan.n_queries(range(texts)),
                     "keys_a_head": n_keys, "stages": measured},
        "scaled": {
            "texts": TEXTS, "steps": STEPS, "factors": factors, "stages_of_a_layer": layer,
            "layer_s": total(own, "s"), "layer_cpu_s": total(own, "cpu_s"),
            "s_a_kv_head": total(own, "s") / KV_HEADS,
            "cpu_s_a_kv_head": total(own, "cpu_s") / KV_HEADS,
            "with_forward_s_a_kv_head": total(layer, "s") / KV_HEADS,
            f"model_of_{LAYERS}_layers_s": LAYERS * total(layer, "s"),
            f"model_of_{LAYERS}_layers_cpu_s": LAYERS * total(layer, "cpu_s"),
        },
        "expected_layer_bytes": training.memory.layer,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--texts", type=int, default=2, help="of the large layer, at least 2")
    parser.add_argument("--steps", type=int, default=40, help="of the large layer's routers")
    parser.add_argument("--reference-texts", type=int, default=TEXTS)
    parser.add_argument("--only", choices=("reference", "large"))
    options = parser.parse_args()
    report = {"environment": environment(), "device": options.device, "load_before": load()}
    if options.only != "large":
        report["reference"] = reference_model(options.reference_texts, options.device)
    if options.only != "reference":
        report["large_layer"] = large_layer(
            options.texts, options.steps, options.device, getattr(torch, options.dtype)
        )
    report["load_after"] = load()
    report["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if options.device == "cuda":
        report["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
    name = torch.cuda.get_device_name() if options.device == "cuda" else cpu_name()
    path = report_path(name, "training.json")
    if options.only and path.is_file():
        report = json.loads(path.read_text()) | report
    write(path, report)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
