"""Time per generated token in transformers: dense attention against Saap, 8k to 128k tokens.

    python -m benchmarks.decode [--contexts 8192,32768,131072] [--budget 2048] [--threads 2]

Two models: the shipped reference model, and random weights of Llama-3.2-1B's shape cut to two
layers and a small vocabulary. Caches are filled with random keys and values; the routers of
`blend` are random networks of the size that `saap.train` makes. What is timed hardly depends on
what they hold, except that lists of random keys are of equal size and that the query heads of a
group have no candidates in common: more of the whole codes are read than of a real text.
The ways take turns:

- `transformers`: its own SDPA over its `DynamicCache`, which copies the cache for every token;
- `packed`: SDPA with the query heads of a group packed as query rows, over a cache written in
  place: the fair dense attention;
- `saap`, `blend`: `saap.attached` with the method of that name.

`attention_ms` is all that replaces dense attention: cache, RoPE removal, choosing, attention.
JSON goes to `$OUT` or `benchmarks/results/<device>/decode.json`.
"""

import argparse
import itertools
import statistics
import sys
import time
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer

import saap
from saap import hf
from saap.budget import Budget
from saap.eval import reference
from saap.eval.tasks import speed
from saap.hf import attention
from saap.hf.forward import Forward
from saap.index.routers import MLPRouter
from saap.kv import KVStore
from saap.kv.next_step import NextStep
from saap.trained_index import LayerIndex, TrainedIndex
from saap.training import N_SEGMENTS, default_nlist

from .cpu import cpu_name, environment
from .cpu_timing import load, take_turns
from .reports import report_path, write

HIDDEN = 64  # of the routers, as `saap.train` makes them
SPARE = 2048
STEPS_A_TURN = 4
PARTS = ("append", "rope", "choosing", "attention")
METHODS = ("saap", "blend")


def llama_1b_two_layers():
    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072 + SPARE,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


MODELS = {
    "reference": lambda: hf.load_model(reference.FOLDER),
    "llama-3.2-1b, 2 layers": llama_1b_two_layers,
}


def random_index(about: dict, nlist: int) -> TrainedIndex:
    """Partition and routers of the sizes that training would give."""
    heads, n_kv, dim = about["num_heads"], about["num_kv_heads"], about["head_dim"]
    layers = []
    for _ in range(about["num_layers"]):
        router = MLPRouter(
            torch.zeros(heads, dim),
            torch.ones(heads, dim),
            torch.randn(heads, HIDDEN, dim),
            torch.zeros(heads, HIDDEN),
            torch.randn(heads, nlist + 1, HIDDEN) / HIDDEN**0.5,
            torch.zeros(heads, nlist + 1),
        )
        centroids = torch.nn.functional.normalize(torch.randn(n_kv, nlist, dim), dim=-1)
        layers.append(
            LayerIndex(
                centroids,
                {"mlp": router.quantized()},
                n_segments=N_SEGMENTS,
                key_scale=torch.full((n_kv, nlist), float(dim) ** 0.5),
                inv_freq=1e4 ** (-torch.arange(0, dim, 2) / dim),
                sm_scale=dim**-0.5,
            )
        )
    return TrainedIndex(tuple(layers), {"model": about, "nlist": nlist, "router": "mlp"})


class InPlaceLayer(DynamicLayer):
    """A dense cache layer that is written in place, as a fair dense baseline has to be."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor):
        super().__init__()
        self.length, self.is_initialized = k.shape[2], True
        self.keys, self.values = (
            torch.cat([t, t.new_zeros(*t.shape[:2], SPARE, t.shape[3])], 2) for t in (k, v)
        )

    def update(self, key_states, value_states, *_, **__):
        end = self.length + key_states.shape[2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0


def packed_sdpa(module, query, key, value, attention_mask, *, scaling, **_):
    """One query token: the G query heads of a KV head as G query rows."""
    packed = query.squeeze(2).unflatten(1, (key.shape[1], -1))
    out = torch.nn.functional.scaled_dot_product_attention(packed, key, value, scale=scaling)
    return out.flatten(1, 2).unsqueeze(1), None


AttentionInterface.register("packed_sdpa", packed_sdpa)
AttentionMaskInterface.register("packed_sdpa", lambda *_, **__: None)


class Clock:
    """Seconds spent in parts of a step; a part within a part counts for the inner one alone."""

    def __init__(self):
        self.spent: dict[str, float] = {}
        self.inner = [0.0]

    def timed(self, name, function):
        def call(*args, **options):
            self.inner.append(0.0)
            begin = time.perf_counter()
            found = function(*args, **options)
            took = time.perf_counter() - begin
            self.spent[name] = self.spent.get(name, 0.0) + took - self.inner.pop()
            self.inner[-1] += took
            return found

        return call

    @contextmanager
    def watching(self):
        places = {
            "append": ((KVStore, "append"), (NextStep, "write")),
            "rope": ((attention, "VARIANTS"),),
            "choosing": speed.PLACES["ranges"],
            "attention": speed.PLACES["attend"],
            "glue": ((Forward, "__call__"),),
        }
        patches = [
            mock.patch.object(owner, name, self.timed_in(part, getattr(owner, name)))
            for part, functions in places.items()
            for owner, name in functions
        ]
        with ExitStack() as opened:
            for patch in patches:
                opened.enter_context(patch)
            yield

    def timed_in(self, part, what):
        """A function that is timed, or a table of such functions."""
        if isinstance(what, dict):
            return {name: self.timed(part, function) for name, function in what.items()}
        return self.timed(part, what)


def measure(model, context: int, budget: Budget, nlist: int, seconds: float) -> dict:
    about = hf.describe(model)
    shape = (1, about["num_kv_heads"], context, about["head_dim"])
    layers = [torch.randn(2, *shape) for _ in range(about["num_layers"])]
    own_attention = model.config._attn_implementation
    token = torch.tensor([[5]])
    packed = DynamicCache(config=model.config)
    packed.layers = [InPlaceLayer(k, v) for k, v in layers]
    plain = DynamicCache(config=model.config)
    for number, (k, v) in enumerate(layers):
        plain.update(k, v, number)

    def dense_step(cache, implementation):
        """As `model.generate` without our cache, be the model attached or not."""
        before = model.config._attn_implementation
        model.config._attn_implementation = implementation
        try:
            model(token, **hf.over(cache))
        finally:
            model.config._attn_implementation = before

    ways = {
        "packed": lambda: dense_step(packed, "packed_sdpa"),
        "transformers": lambda: dense_step(plain, own_attention),
    }
    records = {}
    with torch.no_grad():
        dense_attention = attention_of_packed(ways["packed"], packed)
        for method in METHODS:
            index = random_index(about, nlist) if method == "blend" else None
            with saap.attached(model, index, budget, method=method) as saap_model:
                begin = time.perf_counter()
                cache = filled(saap_model, layers, context)
                made = time.perf_counter() - begin

                def step(cache=cache):
                    model(token, **hf.over(cache))

                # Not all methods' turns at once: a model is attached to one of them at a time.
                turns = {
                    "saap": [step] * STEPS_A_TURN,
                    "packed": [ways["packed"]] * STEPS_A_TURN,
                    "transformers": [ways["transformers"]],
                }
                spent = take_turns(turns, seconds)
                records[method] = about_method(cache, step, spent, dense_attention)
                records[method]["made_s"] = made
                del cache, step
    return {"context": context, "packed_attention_ms": dense_attention, "methods": records}


def filled(saap_model, layers, context):
    """A cache of random rows, indexed as by the first step of decoding."""
    cache = saap_model.cache(capacity=context + SPARE)
    for layer, (k, v) in zip(cache.saap_layers, layers, strict=True):
        store = layer.store
        store.append(k, v, k)
        store.flush()
        layer.slots = context
    cache.last_positions = [context - 1] * len(layers[0][0])
    return cache


def about_method(cache, step, spent, dense_attention) -> dict:
    parts = broken_down(step)
    held = sum(2 * layer.store.k[:, :, : layer.store.length].nbytes for layer in cache.saap_layers)
    own = sum(ms for name, ms in parts.items() if name != "projection")
    selectors = [layer.store.selector for layer in cache.saap_layers]
    return {
        "step_ms": {name: statistics.median(ms) for name, ms in spent.items()},
        "speedup": {
            name: statistics.median(
                dense / mine for dense, mine in zip(spent[name], spent["saap"], strict=True)
            )
            for name in ("packed", "transformers")
        },
        "parts_ms": parts,
        "attention_ms": own,
        "attention_speedup": dense_attention / own,
        "flush_ms_per_token": flush_ms(cache),
        "visited_share": cache.visited_share,
        "kb_to_choose": sum(s.nbytes for s in selectors) / len(selectors) / 1e3,
        "cache_bytes_per_kv_byte": cache.nbytes / held,
        "raw_ms": spent,
    }


def broken_down(step, n: int = 24) -> dict[str, float]:
    """Median milliseconds of each part in a step; `projection` is all that is not attention."""
    found: dict[str, list[float]] = {}
    for _ in range(n):
        clock = Clock()
        with clock.watching():
            clock.timed("projection", step)()
        for name, seconds in clock.spent.items():
            found.setdefault(name, []).append(1e3 * seconds)
    # Not every method takes RoPE off.
    names = ("projection", *PARTS, "glue")
    return {name: statistics.median(found.get(name, [0.0])) for name in names}


def attention_of_packed(step, cache, n: int = 12) -> float:
    """Median milliseconds in the cache and the attention of a dense step, all layers together."""
    found = []
    for _ in range(n):
        clock = Clock()
        with (
            mock.patch.object(cache, "update", clock.timed("attention", cache.update)),
            mock.patch.object(
                torch.nn.functional,
                "scaled_dot_product_attention",
                clock.timed("attention", torch.nn.functional.scaled_dot_product_attention),
            ),
        ):
            step()
        found.append(1e3 * clock.spent["attention"])
    return statistics.median(found)


def flush_ms(cache) -> float:
    """Milliseconds per token, all layers, to put tokens into lists: one flush over its tokens."""
    spent, n_flushed = 0.0, 0
    for layer in cache.saap_layers:
        store = layer.store
        store.flush()
        held, length = store.middles[0], store.length
        due = next(n for n in itertools.count(1) if store.budget.rows_in_lists(length + n) > held)
        token = torch.randn(1, store.k.shape[1], due, store.k.shape[3])
        store.append(token, token, token)
        begin = time.perf_counter()
        store.flush()
        spent += time.perf_counter() - begin
        n_flushed = store.middles[0] - held
    return 1e3 * spent / n_flushed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", default="8192,32768,131072")
    parser.add_argument("--budget", type=int, help="rows of the middle per step; the default's")
    parser.add_argument("--nlist", type=int, help="as `saap.train` chooses by context")
    parser.add_argument("--seconds", type=float, default=10, help="of turns for each context")
    parser.add_argument("--threads", type=int, help="torch's number of threads")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    contexts = [int(part) for part in options.contexts.split(",")]
    budget = Budget(max_tokens=options.budget or Budget.default().max_tokens)
    records = []
    for name, make in MODELS.items():
        model = make()
        for context in contexts:
            nlist = options.nlist or default_nlist(context)
            record = measure(model, context, budget, nlist, options.seconds)
            records.append({"model": name, "nlist": nlist, **record})
            print_record(records[-1])
    report = {
        "environment": {**environment(), "load_after": load()},
        "budget": {"max_tokens": budget.max_tokens, "window": budget.window},
        "records": records,
    }
    path = report_path(cpu_name(), "decode.json")
    write(path, report)
    print(f"wrote {path}")
    return 0


def print_record(r: dict) -> None:
    print(f"{r['model']}, {r['context']:,} tokens: {r['packed_attention_ms']:.2f} ms packed SDPA")
    for name, own in r["methods"].items():
        steps = ", ".join(f"{who} {ms:.2f}" for who, ms in own["step_ms"].items())
        parts = ", ".join(f"{part} {ms:.2f}" for part, ms in own["parts_ms"].items())
        print(
            f"  {name}: ms per step: {steps}; {own['speedup']['packed']:.1f}x packed, "
            f"{own['speedup']['transformers']:.1f}x transformers\n"
            f"    {parts}; flush {own['flush_ms_per_token']:.2f} per token\n"
            f"    attention alone {own['attention_ms']:.2f}, {own['attention_speedup']:.1f}x; "
            f"visited {own['visited_share']:.1%}, {own['kb_to_choose']:,.0f} kB to choose; "
            f"{own['cache_bytes_per_kv_byte']:.3f} bytes held per byte of KV",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
