"""`saap.train`: partitions and routers for every layer and head of a model.

Two passes over the corpus. The first collects de-RoPEd keys and clusters them; the second
computes, inside each layer's attention, the true mass over buckets of a sample of queries. Then
all routers are fitted at once. Memory: one sequence's cache, the sampled keys, and the targets.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from saap.index import fitting, kmeans

from . import hf, rope
from .masses import Masses, attention_masses
from .prefill import DensePrefill, LayerCall
from .trained_index import LayerIndex, TrainedIndex

Progress = Callable[[str, int, int], None]
TRAINABLE = ("mlp", "linear", "centroid")
N_SEGMENTS = 16
RECALL_SHARE = 16  # the recorded recall visits nlist / 16 buckets


def default_nlist(context: int) -> int:
    """Buckets for a context: the power of two nearest to context / 32, from 16 to 1024.

    1024 from 32k on, as in the paper; about 32 rows a bucket below, so that 5 % of a short context
    is still several buckets.
    """
    return min(1024, max(16, 2 ** round(math.log2(max(context, 1) / 32))))


def default_window(context: int) -> int:
    """The recent window that stays dense: 1/32 of the context, at least 16."""
    return max(16, context // 32)


@dataclass(frozen=True)
class Sampling:
    """How much of the corpus is used: `key_sample` keys a head, from at most `key_sequences`
    sequences, and every `query_stride`-th query of all."""

    n_sink: int
    window: int
    key_sample: int = 65536
    key_sequences: int = 12
    query_stride: int = 8


@dataclass
class SampledKeys:
    """Keys of one layer, pieces of `[Hkv, n, D]`, and what is known of its attention."""

    derope: list[Tensor] = field(default_factory=list)
    rope: list[Tensor] = field(default_factory=list)
    inv_freq: Tensor | None = None
    interleaved: bool = False
    sm_scale: float = 1.0


class KeySampler(DensePrefill):
    """Keeps a fixed random share of the keys of each layer, with and without RoPE."""

    def __init__(self, capacity: int, keep: dict[int, SampledKeys], picked: Tensor):
        super().__init__(capacity)
        self.keep, self.picked = keep, picked

    def __call__(self, call: LayerCall) -> Tensor:
        out = super().__call__(call)
        first = self.caches[call.layer].length - call.k_rope.shape[2]
        inside = (self.picked >= first) & (self.picked < self.caches[call.layer].length)
        rows = self.picked[inside] - first
        own = self.keep.setdefault(call.layer, SampledKeys())
        own.derope.append(call.k_derope[0][:, rows])
        own.rope.append(call.k_rope[0][:, rows])
        own.sm_scale = call.sm_scale
        if call.rope is not None and own.inv_freq is None:
            own.inv_freq = rope.frequencies(*call.rope).cpu()
            own.interleaved = call.rope[0] in rope.INTERLEAVED
        return out


@dataclass
class Observed:
    """What the queries of one layer looked at; pieces along n, see `masses.Masses`."""

    q: list[Tensor] = field(default_factory=list)
    mass: list[Tensor] = field(default_factory=list)
    sizes: list[Tensor] = field(default_factory=list)
    block_of: list[Tensor] = field(default_factory=list)

    def add(self, q_derope: Tensor, masses: Masses) -> None:
        n_blocks = sum(s.shape[1] for s in self.sizes)
        self.q.append(q_derope[0].float())
        self.mass.append(masses.buckets[0].half())
        self.sizes.append(masses.sizes[0])
        self.block_of.append(n_blocks + torch.arange(q_derope.shape[2]) // masses.block)

    def joined(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`q [Hq, n, D], mass [Hq, n, nlist + 1], sizes [Hkv, blocks, nlist], block_of [n]`."""
        joined = (torch.cat(t, 1) for t in (self.q, self.mass, self.sizes))
        return *joined, torch.cat(self.block_of)


class MassRecorder(DensePrefill):
    """Computes the true masses of sampled queries inside each layer's attention."""

    def __init__(
        self,
        capacity: int,
        centroids: list[Tensor],
        sampling: Sampling,
        keep: dict[int, Observed],
    ):
        super().__init__(capacity)
        self.centroids, self.sampling, self.keep = centroids, sampling, keep

    def __call__(self, call: LayerCall) -> Tensor:
        out = super().__call__(call)
        cache = self.caches[call.layer]
        k_rope, _, k_derope = cache.views()
        centroids = self.centroids[call.layer]
        places = torch.arange(cache.length - call.q_rope.shape[2], cache.length)
        shortest = self.sampling.n_sink + self.sampling.window + centroids.shape[1]
        chosen = places[(places % self.sampling.query_stride == 0) & (places >= shortest)]
        if len(chosen) == 0:
            return out
        rows = chosen - places[0]
        masses = attention_masses(
            call.q_rope[:, :, rows],
            k_rope,
            kmeans.assign(k_derope, centroids),
            chosen.to(k_rope.device),
            centroids.shape[1],
            sm_scale=call.sm_scale,
            n_sink=self.sampling.n_sink,
            window=self.sampling.window,
            softcap=call.softcap,
        )
        self.keep.setdefault(call.layer, Observed()).add(call.q_derope[:, :, rows], masses)
        return out


def as_sequences(token_ids: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """1-D sequences of int64; ValueError for anything else and for an empty corpus."""
    sequences = list(token_ids)
    if not sequences or any(t.ndim != 1 or t.numel() == 0 for t in sequences):
        shapes = [tuple(t.shape) for t in sequences[:3]]
        raise ValueError(
            f"token_ids has sequences of shape {shapes}: accepted are [n, T] or 1-D ones, "
            "none empty"
        )
    return [t.long() for t in sequences]


@torch.no_grad()
def train(
    model,
    token_ids: Tensor | Sequence[Tensor],
    *,
    nlist: int | None = None,
    router: str = "mlp",
    seed: int = 0,
    n_sink: int = 16,
    window: int | None = None,
    n_segments: int = N_SEGMENTS,
    hidden: int = 64,
    steps: int = 400,
    baselines: bool = False,
    progress: Progress | None = None,
) -> TrainedIndex:
    """Partitions and routers for every layer of a Hugging Face model.

    `token_ids`: a LongTensor `[n, T]` or a list of 1-D ones; one in eight sequences is kept back
    to measure the recorded recall. `nlist`: buckets a KV head (`default_nlist` of the longest
    sequence). `router`: the default router of the result, "mlp" (Saap's classifier), "linear" or
    "centroid" (nothing but k-means is trained). `n_segments`: time segments into which decoding
    cuts the buckets (`saap.routing`), 1 for whole buckets.
    `n_sink`, `window`: the tokens that stay dense in use (`default_window`). `hidden`, `steps`:
    width and optimiser steps of the network. `baselines` adds what is only there to be compared
    with: the linear router, and centroids of keys with RoPE left on.
    `progress(what, done, total)` is called as work proceeds. The same seed gives the
    same index on the same machine.

    Raises ValueError for a model without RoPE, an empty or too short corpus, or bad options, and
    FloatingPointError when the router's loss is not finite.

    Source: Saap, arXiv 2502.08246.
    """
    if router not in TRAINABLE:
        raise ValueError(f"router={router!r}: accepted are {', '.join(TRAINABLE)}")
    sequences = as_sequences(token_ids)
    longest = max(len(t) for t in sequences)
    if longest > hf.max_context(model):
        raise ValueError(
            f"a sequence has {longest} tokens: accepted are at most the model's "
            f"max_position_embeddings={hf.max_context(model)}"
        )
    nlist = default_nlist(longest) if nlist is None else nlist
    sampling = Sampling(n_sink, default_window(longest) if window is None else window)
    shortest = sampling.n_sink + sampling.window + nlist
    sequences = [t for t in sequences if len(t) > shortest]
    if len(sequences) < 2:
        raise ValueError(
            f"{len(sequences)} sequences are longer than n_sink + window + nlist = {shortest} "
            "tokens: accepted are at least 2; lower nlist or bring more text"
        )
    progress = progress or (lambda what, done, total: None)
    held = max(1, len(sequences) // 8)

    sampled, centroids, centroids_rope = _partition(
        model, sequences[held:], nlist, sampling, seed, baselines, progress
    )
    observed = {}
    for what, part in (
        ("attention mass over buckets", sequences[held:]),
        ("held-out mass", sequences[:held]),
    ):
        kept: dict[int, Observed] = {}
        for number, tokens in enumerate(part):
            recorder = MassRecorder(len(tokens), centroids, sampling, kept)
            hf.run_chunks(model, tokens[None], recorder)
            progress(what, number + 1, len(part))
        observed[what] = [kept[layer].joined() for layer in range(len(centroids))]
    fitted, held_out = observed.values()
    wanted = {router, *(("linear", "mlp") if baselines else ())} - {"centroid"}
    routers = _fit_routers(fitted, sorted(wanted), hidden, steps, seed, progress)
    layers = tuple(
        LayerIndex(
            centroids[i],
            routers[i],
            centroids_rope[i] if baselines else None,
            n_segments,
            _key_scale(own, centroids[i]),
            own.inv_freq,
            own.interleaved,
            own.sm_scale,
        )
        for i, own in enumerate(sampled)
    )
    index = TrainedIndex(
        layers,
        {
            "model": hf.describe(model),
            "nlist": nlist,
            "router": router,
            "seed": seed,
            "context": longest,
            "n_sink": sampling.n_sink,
            "window": sampling.window,
            "n_segments": n_segments,
            "interleaved": any(own.interleaved for own in sampled),
            "sm_scale": [own.sm_scale for own in sampled],
            "corpus": {
                "tokens": sum(len(t) for t in sequences),
                "sha256": hf.fingerprint(torch.cat(sequences)),
            },
        },
    )
    index.metadata["recall"] = held_out_recall(index, held_out)
    return index


def _partition(model, sequences, nlist, sampling, seed, baselines, progress):
    generator = torch.Generator().manual_seed(seed)
    kept: dict[int, SampledKeys] = {}
    sequences = sequences[:: -(-len(sequences) // sampling.key_sequences)]
    each = max(1, sampling.key_sample // len(sequences))
    for number, tokens in enumerate(sequences):
        middle = torch.arange(sampling.n_sink, len(tokens))
        picked = middle[torch.randperm(len(middle), generator=generator)[:each]].sort().values
        hf.run_chunks(model, tokens[None], KeySampler(len(tokens), kept, picked))
        progress("keys", number + 1, len(sequences))
    sampled = [kept[layer] for layer in range(len(kept))]
    centroids, centroids_rope = [], []
    for layer, own in enumerate(sampled):
        centroids.append(kmeans.train_centroids(torch.cat(own.derope, 1), nlist, seed=seed))
        if baselines:
            centroids_rope.append(kmeans.train_centroids(torch.cat(own.rope, 1), nlist, seed=seed))
        own.rope.clear()
        progress("k-means", layer + 1, len(sampled))
    return sampled, centroids, centroids_rope


def _key_scale(sampled: SampledKeys, centroids: Tensor) -> Tensor:
    """Mean product of the keys of each bucket with its centroid, `[Hkv, nlist]`."""
    keys = torch.cat(sampled.derope, 1).float()
    buckets = kmeans.assign(keys[None], centroids)[0].long()
    own = centroids.gather(1, buckets[..., None].expand(-1, -1, keys.shape[-1]))
    products, ones = (keys * own).sum(-1), torch.ones_like(keys[..., 0])
    total = torch.zeros(centroids.shape[:2], device=keys.device).scatter_add_(1, buckets, products)
    count = torch.zeros_like(total).scatter_add_(1, buckets, ones)
    typical = products.mean(1, keepdim=True)
    return (total + typical) / (count + 1)  # a bucket that the sample left empty is typical


def _fit_routers(observed, names, hidden, steps, seed, progress) -> list[dict]:
    """The routers of these names, `[layer][name]`; networks of all layers together."""
    routers: list[dict] = [{} for _ in observed]
    q, mass, sizes = (torch.cat(parts) for parts in zip(*(o[:3] for o in observed), strict=True))
    heads = len(q) // len(observed)
    for name in names:
        if name == "linear":
            joint = fitting.fit_linear(q, mass)
        else:
            with torch.enable_grad():
                joint = fitting.fit_mlp(
                    q, mass, sizes, observed[0][3], hidden=hidden, steps=steps, seed=seed,
                    progress=lambda done, total, loss: progress(
                        f"routers of all layers (loss {loss:.3f})", done, total
                    ),
                )  # fmt: skip
        for layer, found in enumerate(routers):
            own = slice(layer * heads, (layer + 1) * heads)
            found[name] = type(joint)(**{n: t[own].clone() for n, t in joint.tensors().items()})
    return routers


def held_out_recall(index: TrainedIndex, observed) -> dict:
    """Middle recall of each router at `nlist / 16` whole buckets, `[layer][head]`, and the
    oracle's."""
    nprobe = max(1, index.nlist // RECALL_SHARE)
    found: dict[str, list] = {"nprobe": nprobe, "middle_mass": [], "oracle": []}
    for layer, (q, mass, sizes, block_of) in zip(index.layers, observed, strict=True):
        middle = mass[..., :-1].float()
        total = middle.sum((-1, -2)).clamp(min=1e-9)
        found["middle_mass"].append((middle.sum(-1).mean(-1)).tolist())
        found["oracle"].append((middle.topk(nprobe, -1).values.sum((-1, -2)) / total).tolist())
        seen = sizes[:, block_of].transpose(0, 1)
        for name in ("centroid", *layer.routers):
            scores = layer.router(name).mass(q.transpose(0, 1), seen).transpose(0, 1)
            best = scores.topk(nprobe, -1).indices
            caught = middle.gather(-1, best).sum((-1, -2)) / total
            found.setdefault(name, []).append(caught.tolist())
    return {
        k: v if isinstance(v, int) else [[round(x, 4) for x in row] for row in v]
        for k, v in found.items()
    }
