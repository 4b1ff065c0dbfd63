"""Saap in a hand-written decoder: plain PyTorch, no transformers, the KV store alone.

    saap train reference --corpus some/text --out index.safetensors
    python examples/custom_decoder.py --index index.safetensors [--dense] [--prompt-file F]

Loads the weights of the shipped reference model (Llama's architecture, one byte a token), reads a
long prompt and continues it. What Saap needs of a decoder is marked with "Saap:".
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import embedding, linear, rms_norm, scaled_dot_product_attention, silu

from saap import METHODS, Budget, KVStore, LayerInfo, TrainedIndex

FOLDER = Path(__file__).resolve().parents[1] / "eval" / "reference" / "files"
BEGIN, END = 256, 257
PREFILL_CHUNK = 1024


@dataclass(frozen=True)
class Config:
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    eps: float

    @classmethod
    def read(cls, folder: Path) -> "Config":
        c = json.loads((folder / "config.json").read_text())
        return cls(
            c["num_hidden_layers"],
            c["num_attention_heads"],
            c["num_key_value_heads"],
            c["head_dim"],
            c["rope_parameters"]["rope_theta"],
            c["rms_norm_eps"],
        )


def rope_tables(config: Config, positions: Tensor) -> tuple[Tensor, Tensor]:
    """`cos, sin [T, head_dim]`."""
    powers = torch.arange(0, config.head_dim, 2) / config.head_dim
    angles = positions[:, None].float() * config.rope_theta**-powers
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class DenseCache:
    """What `--dense` uses in place of the store: the same call, everything is visited."""

    visited_share = 1.0

    def __init__(self):
        self.k = self.v = None

    def step(
        self, k: Tensor, v: Tensor, k_derope: Tensor, q: Tensor, q_derope: Tensor
    ) -> tuple[Tensor, None]:
        self.k = k if self.k is None else torch.cat([self.k, k], 2)
        self.v = v if self.v is None else torch.cat([self.v, v], 2)
        n, new = self.k.shape[2], q.shape[2]
        seen = torch.ones(new, n, dtype=torch.bool).tril(n - new)
        out = scaled_dot_product_attention(q, self.k, self.v, attn_mask=seen, enable_gqa=True)
        return out, None


class Decoder:
    """Llama's decoder, one sequence; keys and values live in one store for each layer."""

    def __init__(self, config: Config, weights: dict[str, Tensor], stores: list):
        self.config, self.weights, self.stores = config, weights, stores
        self.length = 0

    def layer_weight(self, layer: int, name: str) -> Tensor:
        return self.weights[f"model.layers.{layer}.{name}.weight"]

    def attention(self, layer: int, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        def heads(name: str, count: int) -> Tensor:
            projected = linear(x, self.layer_weight(layer, f"self_attn.{name}_proj"))
            return projected.unflatten(-1, (count, -1)).transpose(1, 2)

        c, store = self.config, self.stores[layer]
        q, k, v = heads("q", c.heads), heads("k", c.kv_heads), heads("v", c.kv_heads)
        # Saap: append the new tokens, attend from them; q and k as they are before RoPE as well.
        out, _ = store.step(rotate(k, cos, sin), v, k, rotate(q, cos, sin), q)
        out = out.transpose(1, 2).flatten(2)
        return linear(out, self.layer_weight(layer, "self_attn.o_proj"))

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        gate = silu(linear(x, self.layer_weight(layer, "mlp.gate_proj")))
        up = linear(x, self.layer_weight(layer, "mlp.up_proj"))
        return linear(gate * up, self.layer_weight(layer, "mlp.down_proj"))

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight.shape, weight, self.config.eps)

    @torch.no_grad()
    def forward(self, tokens: list[int]) -> Tensor:
        """Logits `[vocab]` after these tokens, which follow all that came before."""
        x = embedding(torch.tensor([tokens]), self.weights["model.embed_tokens.weight"])
        tables = rope_tables(self.config, torch.arange(self.length, self.length + len(tokens)))
        for layer in range(self.config.layers):
            normed = self.norm(x, self.layer_weight(layer, "input_layernorm"))
            x = x + self.attention(layer, normed, *tables)
            normed = self.norm(x, self.layer_weight(layer, "post_attention_layernorm"))
            x = x + self.mlp(layer, normed)
        self.length += len(tokens)
        x = self.norm(x[0, -1], self.weights["model.norm.weight"])
        return linear(x, self.weights["model.embed_tokens.weight"])

    def prefill(self, tokens: list[int]) -> Tensor:
        for start in range(0, len(tokens), PREFILL_CHUNK):
            logits = self.forward(tokens[start : start + PREFILL_CHUNK])
        return logits

    def generate(self, logits: Tensor, n_tokens: int):
        """Yield up to `n_tokens` tokens, greedily."""
        for _ in range(n_tokens):
            token = int(logits.argmax())
            if token == END:
                return
            yield token
            logits = self.forward([token])


def make_stores(
    config: Config, index_file: Path | None, budget: Budget, name: str = "saap"
) -> list:
    if index_file is None:
        return [DenseCache() for _ in range(config.layers)]
    # Saap: one store for each layer, with the selector that the method makes for that layer.
    method = METHODS[name](TrainedIndex.load(index_file))
    infos = [LayerInfo(sm_scale=config.head_dim**-0.5, number=i) for i in range(config.layers)]
    return [KVStore(method.selector(info), budget) for info in infos]


def default_prompt() -> bytes:
    """Held-out source text with pass keys in it; the last line asks for one of them."""
    import numpy as np

    from saap.eval import reference
    from saap.eval.tasks.passkey import make_prompt

    return make_prompt(reference.split_held_out()[1], 8000, np.random.default_rng(1)).text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--index", type=Path, help="file that `saap train reference` wrote")
    parser.add_argument(
        "--method", default="saap", choices=METHODS, metavar="NAME", help="one of saap.METHODS"
    )
    parser.add_argument("--prompt-file", type=Path)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument(
        "--max-tokens", type=int, default=400, help="rows of the middle for each step"
    )
    parser.add_argument("--dense", action="store_true")
    options = parser.parse_args()
    if not options.dense and options.index is None:
        parser.error("--index FILE is needed, or --dense")
    config = Config.read(FOLDER)
    weights = {n: w.float() for n, w in load_file(FOLDER / "model.safetensors").items()}
    budget = Budget(max_tokens=options.max_tokens)
    stores = make_stores(config, None if options.dense else options.index, budget, options.method)
    decoder = Decoder(config, weights, stores)
    prompt = options.prompt_file.read_bytes() if options.prompt_file else default_prompt()
    logits = decoder.prefill([BEGIN, *prompt])
    print(
        f"{decoder.length:,} tokens read; they end with {prompt[-40:].decode(errors='replace')!r}"
    )
    begin = time.perf_counter()
    tokens = list(decoder.generate(logits, options.tokens))
    spent = time.perf_counter() - begin
    share = sum(store.visited_share for store in stores) / len(stores)
    print(bytes(t for t in tokens if t < BEGIN).decode(errors="replace"))
    print(f"{share:.1%} of the cache visited, {len(tokens) / spent:.0f} tokens/s")


if __name__ == "__main__":
    main()
